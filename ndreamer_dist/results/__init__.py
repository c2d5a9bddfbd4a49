"""Read results.zarr, the store that users keep, and export parts of it."""
