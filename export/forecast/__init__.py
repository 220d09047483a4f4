"""What a GPU would take that is not here: forecasts, fitted to published latencies. Never a measurement."""
