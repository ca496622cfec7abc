"""How a graph becomes code that runs: torch to train it, generated kernels through TVM to ship it."""
