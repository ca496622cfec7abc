"""Inputs on which a graph can be run, and what its integer inputs may be."""

from __future__ import annotations

import numpy as np

from ir.graph import Graph, Value
from ir.op import Array
from ir.ops.indexing import DynamicUpdate, Take
from ir.ops.shape import Reshape
from ir.ops.structure import NUMPY_DTYPES


def sample_inputs(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Draw inputs on which a graph can be run: standard normal numbers, indices inside their tables."""
    rng = np.random.default_rng(seed)
    bounds = index_bounds(graph)
    drawn: dict[str, Array] = {}
    for name, node in graph.inputs.items():
        kind = node.types[0]
        if kind.is_float:
            drawn[name] = rng.standard_normal(kind.shape).astype(np.float32)
        else:
            drawn[name] = np.asarray(rng.integers(0, bounds.get(name, 2), kind.shape), NUMPY_DTYPES[kind.dtype])
    return drawn


def index_bounds(graph: Graph) -> dict[str, int]:
    """For each integer input that is an index, the number of places it can point at."""
    bounds: dict[str, int] = {}
    for name, node in graph.inputs.items():
        if node.types[0].dtype == "int32":
            limits = _limits(graph, node.results[0])
            if limits:
                bounds[name] = min(limits)
    return bounds


def _limits(graph: Graph, value: Value) -> list[int]:
    limits: list[int] = []
    for user in graph.users(value):
        types = graph.operand_types(user)
        if isinstance(user.op, Take) and user.operands[1] == value:
            limits.append(types[0].shape[0])
        elif isinstance(user.op, DynamicUpdate) and user.operands[2] == value:
            limits.append(types[0].shape[user.op.axis] - types[1].shape[user.op.axis] + 1)
        elif isinstance(user.op, Reshape):
            limits += _limits(graph, user.results[0])
    return limits
