"""Top-1 at matched MACs: the method against its rivals."""
