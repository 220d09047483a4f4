"""Files that are copied into a Triton model repository."""
