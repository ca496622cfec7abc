"""Norms, one a file: `[..., D] -> [..., D]`, each token by itself."""
