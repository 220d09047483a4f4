"""What a run has come to, on one page: `lowpass report DIR`."""
