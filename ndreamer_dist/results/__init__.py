"""What users keep: the results store, how it is read and how parts of it are exported."""
