"""Slim model in, deployable artefact out: ONNX, TensorRT engine, and the sessions that run them."""
