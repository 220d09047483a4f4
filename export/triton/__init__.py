"""A model repository for Triton, a server for it, and a client."""
