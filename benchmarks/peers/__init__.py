"""Rival token reductions, written here from their papers: latency is compared with theirs at equal MACs."""
