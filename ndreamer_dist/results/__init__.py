"""The results that users keep: how the store is read, and how parts of it are exported."""
