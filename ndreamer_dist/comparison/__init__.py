"""Which matching space a cohort favours: measures of every space, a table, and the rule for the advice."""
