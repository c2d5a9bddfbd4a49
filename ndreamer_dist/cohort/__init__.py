"""From an AnnData to packed.zarr: check, design, gene selection, packing and clusters."""
