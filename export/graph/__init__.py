"""The deployment graph: the same arithmetic in fewer kernels."""
