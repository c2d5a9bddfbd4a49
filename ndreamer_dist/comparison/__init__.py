"""Comparisons: of matching spaces on one cohort, of the conditions of a screen, and of two contrasts."""
