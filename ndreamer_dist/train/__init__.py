"""Training: one visible loop, and its life under Ray Train."""
