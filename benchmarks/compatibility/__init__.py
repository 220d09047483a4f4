"""Which runtime reads which opset."""
