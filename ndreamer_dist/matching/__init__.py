"""Counterfactual matching: exact nearest neighbours, and the store of matches (METHOD section 6)."""
