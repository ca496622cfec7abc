"""Heads, one a file: tokens `[B, T, D]` to a task's output."""
