"""Code generation for graphics processors: kernels bound to threads, programs of launches, and ways to run them."""
