"""Plan a run before it starts: its stages, memory, disk and time."""
