"""Measurements: latency of dense against slim, accuracy over seeds. `results/` holds what was measured, and where."""
