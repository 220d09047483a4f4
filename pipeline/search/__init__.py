"""How much of every block goes, and which: the cascade, or a plan that meets a target."""
