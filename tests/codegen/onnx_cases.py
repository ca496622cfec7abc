"""Running graphs as ONNX models."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import numpy as np
import pytest

from codegen.container import relative_error
from codegen.onnx_export.export import output_names, to_onnx
from codegen.onnx_export.verification import runner
from ir.graph import Graph
from ir.initializers import initialize
from ir.interpret import evaluate

TOLERANCE = 1e-5  # of the output's scale: float32 sums of a few dozen products err by about 1e-6

needs_runtime = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="ONNX Runtime is not installed: make bench-deps"
)


def in_runtime(graph: Graph, params: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]):
    """Outputs of a graph in ONNX Runtime, by their names in the graph."""
    run, names = runner(to_onnx(graph, params).SerializeToString()), output_names(graph)
    kinds = {name: np.float32 if node.types[0].is_float else None for name, node in graph.inputs.items()}
    found = run({name: np.asarray(array, kinds[name]) for name, array in inputs.items()})
    return {name: found[names[name]] for name, _ in graph.outputs}


def check_onnx(graph: Graph, inputs: Mapping[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    """Assert that ONNX Runtime gives what the operations mean."""
    params = initialize(graph, 0)
    found = in_runtime(graph, params, inputs)
    for name, expected in evaluate(graph, inputs, params).items():
        assert found[name].shape == expected.shape
        assert found[name].dtype.kind == expected.dtype.kind
        if expected.dtype.kind == "f":
            assert relative_error(found[name], expected) <= tolerance
        else:
            np.testing.assert_array_equal(found[name], expected)
