"""Whether an ONNX model computes what its graph does in torch, run by ONNX Runtime where that is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from codegen import machine
from codegen.container import TOLERANCES, relative_error
from codegen.inputs import sample_inputs
from codegen.onnx_export.export import carried, output_names
from codegen.torch_backend import to_module
from ir.errors import VerificationError
from ir.graph import Graph
from ir.op import Array
from ir.passes.lower_precision import precision_of

STEPS: Final = 4
"""Calls of a graph that carries a state; the first starts from zeros."""
_ERRORS_ONLY: Final = 3


def is_runnable() -> bool:
    """Tell whether ONNX Runtime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def compare(graph: Graph, params: Mapping[str, Array], model: bytes) -> float:
    """Run a model and return its largest difference from torch, relative to each output's scale.

    Raises:
        VerificationError: It cannot be run, or differs by more than `TOLERANCES` allow.
    """
    names, state = output_names(graph), carried(graph)
    run = runner(model)
    module = to_module(graph, params).eval()
    worst, kept = 0.0, {name: np.zeros(graph.inputs[name].types[0].shape, np.float32) for name in state}
    for step in range(STEPS if state else 1):
        inputs = sample_inputs(graph, seed=step) | kept
        if state and "position" in inputs:
            inputs["position"] = np.full_like(inputs["position"], step)
        with torch.inference_mode():
            results = module(**{name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()})
        found = run(inputs)
        for name, expected in results.items():
            worst = max(worst, _error(graph, name, found[names[name]], expected.numpy()))
        kept = {name: results[name].numpy() for name in state}
    return worst


def runner(model: bytes) -> Any:
    """Return a function from named inputs to named outputs.

    Raises:
        VerificationError: ONNX Runtime refuses the model.
    """
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = len(machine.available_cpus())
    options.log_severity_level = _ERRORS_ONLY
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes share no base
        raise VerificationError("ONNX Runtime refuses the model", found=str(error).strip()) from error
    outputs = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(outputs, session.run(None, dict(inputs)), strict=True))

    return run


def _error(graph: Graph, name: str, found: Array, expected: Array) -> float:
    tolerance = TOLERANCES[precision_of(graph)]
    error = relative_error(found, expected)
    if not error <= tolerance:
        raise VerificationError(
            "the ONNX model disagrees with torch",
            where=f"output {name}",
            expected=f"at most {tolerance:g}",
            found=f"{error:g}" if np.isfinite(error) else "values that are not finite",
        )
    return error
