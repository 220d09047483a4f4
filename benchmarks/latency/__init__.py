"""Milliseconds: of whole models in turns, of the parts of a block, and as a target."""
