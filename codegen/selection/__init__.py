"""Choice of kernels: which kernel serves each node of a graph; `codegen.selection.select` is the way in."""
