"""A typed graph of tensor operations: it prints, parses, hashes, costs and runs in numpy.

Import the submodules directly (`ir.graph`, `ir.builder`, `ir.text`, ...); this package imports nothing by itself.
"""
