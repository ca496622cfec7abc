"""Stems, one a file: a task's input to tokens `[B, T, D]`."""
