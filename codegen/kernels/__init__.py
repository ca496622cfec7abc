"""Kernel generators: one file a family, each a frozen dataclass that builds a TIR function and knows its numpy meaning."""
