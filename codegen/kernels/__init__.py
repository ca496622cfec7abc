"""Kernel generators, one file a family: frozen dataclasses that build a TIR function and know its numpy meaning."""
