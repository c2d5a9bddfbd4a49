"""The space that cells are matched in (METHOD sections 5, 9 and 10)."""
