"""Where work runs, and what is seen of it."""
