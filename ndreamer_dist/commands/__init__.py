"""What else can be asked of a run: one module per command."""
