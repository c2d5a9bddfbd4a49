"""Cells of new donors, batches and conditions on a finished run."""
