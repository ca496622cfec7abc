"""Wirings, one a file: how norms, mixers and residual branches make one layer."""
