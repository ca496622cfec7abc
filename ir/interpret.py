"""Run a graph in numpy: the oracle that every backend is held against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ir.errors import GraphError
from ir.graph import Graph, Value
from ir.op import Array
from ir.ops.structure import Input, Parameter


def evaluate(
    graph: Graph, inputs: Mapping[str, Array], params: Mapping[str, Array], *, dtype: npt.DTypeLike = np.float64
) -> dict[str, Array]:
    """Evaluate every output of an expanded graph.

    Args:
        graph: Graph without component nodes.
        inputs: An array for each input, by name.
        params: An array for each parameter, by name.
        dtype: Precision in which floating-point values are computed.

    Returns:
        Output arrays by name.

    Raises:
        GraphError: An input or parameter is missing or has another shape.
    """
    values: dict[Value, Array] = {}
    for node in graph.nodes:
        if node.id not in graph.live:
            continue
        if isinstance(node.op, Input):
            results: tuple[Array, ...] = (_given(inputs, node.op.label, node.types[0].shape, "input"),)
        elif isinstance(node.op, Parameter):
            results = (_given(params, node.op.label, node.types[0].shape, "parameter"),)
        else:
            results = node.op.evaluate_all(tuple(values[operand] for operand in node.operands))
        for value, result in zip(node.results, results, strict=True):
            values[value] = result.astype(dtype) if result.dtype.kind == "f" else result
    return {name: values[value] for name, value in graph.outputs}


def _given(arrays: Mapping[str, Array], name: str, shape: tuple[int, ...], what: str) -> Array:
    if name not in arrays:
        raise GraphError(f"{what} '{name}' is missing", expected=f"an array of shape {shape}")
    array = np.asarray(arrays[name])
    if array.shape != shape:
        raise GraphError(f"{what} '{name}' has another shape", expected=str(shape), found=str(array.shape))
    return array
