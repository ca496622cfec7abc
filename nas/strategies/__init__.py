"""Strategies: which architecture to try next, one file each."""
