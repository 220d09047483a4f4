"""What a search costs, against the authors' schedule."""
