"""One `Session` over every runtime."""
