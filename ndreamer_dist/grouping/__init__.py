"""The groups of a cohort by names alone: levels, sizes, and what becomes of small ones."""
