"""Latency against rivals at matched MACs, on every runtime."""
