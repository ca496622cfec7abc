"""What torch computes for a graph, and how far generated code may be from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch

from codegen.container import TOLERANCES, relative_error
from codegen.torch_backend import to_module
from ir.errors import VerificationError
from ir.graph import Graph
from ir.op import Array
from ir.passes.lower_precision import precision_of

TOLERANCE: Final = TOLERANCES["float32"]
"""Largest difference from torch of a graph in float32."""


def torch_outputs(
    graph: Graph, params: Mapping[str, Array], inputs: Mapping[str, Array], dtype: torch.dtype = torch.float32
) -> dict[str, Array]:
    """Run a graph in torch, its numbers in an element type."""
    module = to_module(graph, params, dtype=dtype).eval()
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    with torch.inference_mode():
        results = module(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()})
    return {name: tensor.detach().numpy() for name, tensor in results.items()}


def torch_outputs_beside(graph: Graph, params: Mapping[str, Array], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run torch on one thread: several that wait for each other stand still wherever the worker takes a CPU."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch_outputs(graph, params, inputs)
    finally:
        torch.set_num_threads(usual)


def verify(
    graph: Graph,
    params: Mapping[str, Array],
    inputs: Mapping[str, Array],
    expected: Mapping[str, Array],
    outputs: Mapping[str, Array],
) -> float:
    """Return the largest difference from torch in float32; where that is too much, from torch in float64.

    Deep models round in torch, too, by about what is allowed: then the exact result tells whose rounding it was.
    """
    precision = precision_of(graph)
    tolerance = TOLERANCES[precision]
    errors = _errors(graph, expected, outputs)
    if precision == "float32" and tolerance < max(errors.values()) < np.inf:
        errors = _errors(graph, torch_outputs(graph, params, inputs, torch.float64), outputs)
    for name, error in errors.items():
        if not error <= tolerance:
            raise VerificationError(
                "the compiled model disagrees with torch",
                where=f"output {name}",
                expected=f"at most {tolerance:g}",
                found=f"{error:g}" if np.isfinite(error) else "values that are not finite",
            )
    return max(errors.values())


def _errors(graph: Graph, expected: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, float]:
    return {name: relative_error(outputs[name], expected[name]) for name, _ in graph.outputs}
