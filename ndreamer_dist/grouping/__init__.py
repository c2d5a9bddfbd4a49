"""Name the groups of a cohort, treat small ones, and sample the groups to match with. Pure."""
