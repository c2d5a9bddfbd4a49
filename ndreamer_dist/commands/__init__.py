"""The other commands on a run: one module per command."""
