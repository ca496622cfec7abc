"""Passes from graph to graph, a file each; import the submodules directly."""
