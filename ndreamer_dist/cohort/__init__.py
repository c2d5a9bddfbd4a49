"""Check the input AnnData, define its groups, select genes, write packed.zarr and cluster the cells."""
