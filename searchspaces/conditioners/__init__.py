"""Conditioners, one a file: side inputs of each example to one vector."""
