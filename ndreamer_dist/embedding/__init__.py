"""Compute the coordinates in which cells are matched (METHOD sections 5, 9 and 10)."""
