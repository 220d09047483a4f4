"""Rivals: token reductions and channel pruning without training, as their papers state them, at equal MACs."""
