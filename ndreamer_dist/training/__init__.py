"""Training: sampling plan, mini-batches, the training loop, and Ray Train around it (METHOD section 4)."""
