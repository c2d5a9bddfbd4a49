"""Summarise populations by streaming over their cells."""
