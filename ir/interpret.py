"""Run a graph in numpy: the oracle that every backend is held against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ir.errors import GraphError
from ir.graph import Graph, Value
from ir.op import Array
from ir.ops.structure import Input, Parameter
from ir.types import TensorType


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
            results: tuple[Array, ...] = (_given(inputs, node.op.label, node.types[0], "input"),)
        elif isinstance(node.op, Parameter):
            results = (_given(params, node.op.label, node.types[0], "parameter"),)
        else:
            results = node.op.evaluate_all(tuple(values[operand] for operand in node.operands))
        for value, result in zip(node.results, results, strict=True):
            values[value] = np.asarray(result, dtype) if result.dtype.kind == "f" else np.asarray(result)
    return {name: values[value] for name, value in graph.outputs}


def _given(arrays: Mapping[str, Array], name: str, kind: TensorType, what: str) -> Array:
    if name not in arrays:
        raise GraphError(f"{what} '{name}' is missing", expected=f"an array of shape {kind.shape}")
    array = np.asarray(arrays[name])
    if array.shape != kind.shape:
        raise GraphError(f"{what} '{name}' has another shape", expected=str(kind.shape), found=str(array.shape))
    kinds = "fiu" if kind.is_float else {"int32": "iu", "bool": "b"}[kind.dtype]
    if array.dtype.kind not in kinds:
        raise GraphError(f"{what} '{name}' has another dtype", expected=kind.dtype, found=str(array.dtype))
    return array.astype(np.float64) if kind.is_float else array
