"""Sums over the cells of populations, streamed."""
