"""What a precision costs in agreement, and gains in time."""
