"""A run directory from start to end."""
