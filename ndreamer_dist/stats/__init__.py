"""Statistics over effects (METHOD section 7)."""
