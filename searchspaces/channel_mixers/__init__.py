"""Channel mixers, one a file: `[..., D] -> [..., D]`, each token by itself."""
