"""Macros, one a file: how stem, layers and head make a model."""
