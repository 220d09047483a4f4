"""Dense against slim behind one Triton server."""
