"""The method as pure functions of tensors, each beside its equation in the paper. Imports nothing of the project."""
