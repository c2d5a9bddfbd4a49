"""A run directory: finished work, its settings, and the process that works on it."""
