"""Training loop and its settings; `budget` imports no torch, `fit` does."""
