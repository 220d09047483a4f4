"""ONNX files: traced, quantised, verified."""
