"""Denoised expression, batch effects and treatment effects, and the store that holds them (METHOD section 6)."""
