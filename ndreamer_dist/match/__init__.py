"""Counterfactual matching and the effects through it (METHOD section 6)."""
