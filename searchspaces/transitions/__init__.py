"""Transitions between the stages of a pyramid, a file each."""
