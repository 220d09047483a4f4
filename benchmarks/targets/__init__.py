"""How near searches come to their targets."""
