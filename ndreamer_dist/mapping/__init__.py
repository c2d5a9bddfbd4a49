"""Map cells of new donors, batches and conditions onto a finished run."""
