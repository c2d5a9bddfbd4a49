"""From packed.zarr to mini-batches: which rows make a step, and how they are read."""
