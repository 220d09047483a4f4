"""How many kernels an engine has, and how many bytes they move: counted without a GPU."""
