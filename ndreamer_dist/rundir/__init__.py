"""Manage a run directory: its finished shards, its settings and its lock."""
