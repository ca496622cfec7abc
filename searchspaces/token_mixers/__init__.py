"""Token mixers, one a file: `[B, T, D] -> [B, T, D]` along the token axis."""
