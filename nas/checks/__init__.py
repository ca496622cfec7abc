"""Checks that a component computes what its paper says, and that a published architecture is what was published."""
