"""Training: sampling plan, mini-batches, the loop, and Ray Train around it (METHOD section 4)."""
