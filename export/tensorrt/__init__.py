"""TensorRT engines of a run."""
