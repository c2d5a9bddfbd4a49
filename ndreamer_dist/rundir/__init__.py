"""A run directory: what has been done, under which settings, and by whom it is being worked on."""
