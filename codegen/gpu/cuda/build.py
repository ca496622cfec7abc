"""Libraries with machine code for NVIDIA GPUs; made in a worker process that has `nvcc.worker_environment`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from codegen import build
from codegen.artifact import describe_target
from codegen.build import BuiltModel
from codegen.gpu.cuda import device, nvcc
from codegen.gpu.loading import open_memory
from codegen.kernels.base import Array
from codegen.targets.base import Target
from codegen.tuning import TuningDatabase
from codegen.virtual_machine import VirtualMachine
from ir.errors import CompileError
from ir.graph import Graph


def build_and_run(
    graphs: Mapping[str, Graph],
    params: Mapping[str, Array],
    target: Target,
    database: TuningDatabase,
    inputs: Mapping[str, Mapping[str, Array]],
) -> tuple[BuiltModel, dict[str, dict[str, Array]] | None]:
    """Generate one library of graphs that share parameters, and run each function once where there is a GPU for it.

    Returns:
        What was built, and the outputs by function and name; None where the code cannot be run here.

    Raises:
        CompileError: A node has no kernel, the compiler refuses, or the library holds no machine code.
    """
    assert target.gpu is not None
    built = build.build(graphs, params, target, database)
    _check_code(built.library, target.gpu.model)
    if device.why_not_run(target.gpu.model):
        return built, None
    return built, _run(built, graphs, inputs, target)


def _check_code(library: bytes, architecture: str) -> None:
    """Source that is compiled when it is loaded would need a compiler there."""
    wanted, found = architecture.rstrip("a"), nvcc.architectures_of(library)
    if wanted not in found:
        raise CompileError(
            "the library holds no machine code for the GPU",
            expected=wanted,
            found=", ".join(found) or "none",
            hint=nvcc.HINT,
        )


def _run(
    built: BuiltModel, graphs: Mapping[str, Graph], inputs: Mapping[str, Mapping[str, Array]], target: Target
) -> dict[str, dict[str, Array]]:
    memory = open_memory(describe_target(target), "the library")
    vm = VirtualMachine(built.library, "the library", memory)
    weights = {name: memory.place(array) for name, array in built.weights.items()}
    found: dict[str, dict[str, Array]] = {}
    for name, graph in graphs.items():
        given = [memory.place(np.asarray(inputs[name][key])) for key in graph.inputs]
        call = vm.bind(name, [*given, *(weights[key] for key in built.functions[name].weights)])
        result = vm.run(call)
        tensors = [result] if len(graph.outputs) == 1 else list(result)
        found[name] = {key: memory.fetch(tensor) for (key, _), tensor in zip(graph.outputs, tensors, strict=True)}
    return found
