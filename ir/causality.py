"""Whether an output depends on the past of an input only, found by changing the input and looking."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.errors import GraphError
from ir.graph import Graph, Node, Value
from ir.interpret import evaluate
from ir.op import Array
from ir.ops.indexing import Gather, ScatterAdd, Take
from ir.ops.shape import Broadcast, Concat, Reshape, Slice, Transpose
from ir.types import TensorType

TOLERANCE = 1e-9
"""Largest change, relative to the output's scale, that still counts as rounding in float64."""


def check_causal(
    graph: Graph, input: str, output: str, params: Mapping[str, Array], axis: int = 1, *, rng: np.random.Generator
) -> int | None:
    """Change the input at each position in turn and see that no earlier output changes.

    Args:
        graph: Expanded graph.
        input: Name of the input to change.
        output: Name of the output to watch.
        params: Values of the parameters; random ones, since zeros hide what depends on what.
        axis: Axis of tokens, in the input as in the output.
        rng: Draws the inputs and the changes.

    Returns:
        None if the output is causal, else the first position whose change reaches an earlier output.

    Raises:
        GraphError: No such input or output, or they differ in length along the axis.
    """
    watched = dict(graph.outputs)
    if input not in graph.inputs or output not in watched:
        found = f"inputs {', '.join(graph.inputs)}; outputs {', '.join(watched)}"
        raise GraphError("no such input or output", expected=f"{input} and {output}", found=found)
    source, result = graph.inputs[input].types[0], graph.type_of(watched[output])
    if not (axis < min(source.rank, result.rank) and source.shape[axis] == result.shape[axis]):
        raise GraphError("input and output differ in length", where=f"axis {axis}", found=f"{source} and {result}")
    inputs = {name: draw_input(graph, node, rng) for name, node in graph.inputs.items()}
    before = evaluate(graph, inputs, params)[output]
    limit = TOLERANCE * max(float(np.max(np.abs(before))), 1.0)
    for position in range(1, source.shape[axis]):
        changed = inputs | {input: _changed(graph, graph.inputs[input], inputs[input], axis, position, rng)}
        difference = np.abs(evaluate(graph, changed, params)[output] - before)
        if not np.all(np.take(difference, np.arange(position), axis) <= limit):
            return position
    return None


def draw_input(graph: Graph, node: Node, rng: np.random.Generator) -> Array:
    """A random value for an input: normal, or an index that is valid wherever it is used as one."""
    kind: TensorType = node.types[0]
    if kind.is_float:
        return rng.standard_normal(kind.shape)
    if kind.dtype == "bool":
        return rng.integers(0, 2, kind.shape).astype(np.bool_)
    return rng.integers(0, index_bound(graph, node.results[0]), kind.shape, dtype=np.int32)


def index_bound(graph: Graph, value: Value) -> int:
    """Length of the shortest axis that a value, moved about or not, indexes; 2 where it indexes none."""
    bounds: list[int] = []
    for user in graph.users(value):
        if isinstance(user.op, Take) and user.operands[1] == value:
            bounds.append(graph.type_of(user.operands[0]).shape[0])
        elif isinstance(user.op, Gather | ScatterAdd) and user.operands[1] == value:
            bounds.append(graph.type_of(user.operands[0]).shape[user.op.axis])
        elif isinstance(user.op, Reshape | Transpose | Slice | Concat | Broadcast):
            bounds.append(index_bound(graph, user.results[0]))
    found = [bound for bound in bounds if bound > 0]
    return min(found) if found else 2


def _changed(graph: Graph, node: Node, array: Array, axis: int, position: int, rng: np.random.Generator) -> Array:
    """The array with other values at one position."""
    changed = np.array(array)
    index: list[slice | int] = [slice(None)] * array.ndim
    index[axis] = position
    place = tuple(index)
    if node.types[0].is_float:
        changed[place] += rng.standard_normal(changed[place].shape)
    elif node.types[0].dtype == "bool":
        changed[place] = ~changed[place]
    else:
        bound = index_bound(graph, node.results[0])
        changed[place] = (changed[place] + rng.integers(1, max(bound, 2), changed[place].shape)) % bound
    return changed
