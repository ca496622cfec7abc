"""Runs kernels of graphics processors on whatever OpenCL device is here and holds them against numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from codegen import targets
from codegen._tvm import DEVICE_CONFIG, DEVICE_PIPELINE, IRModule, PassContext, Target, recorded_kernels, tvm
from codegen.gpu.execute import run_program, why_not_run
from codegen.gpu.registry import generator
from codegen.kernels.base import Array, Kernel, storage_dtype
from ir.rounding import from_bfloat16_bits

OPENCL = targets.get("opencl").gpu
assert OPENCL is not None
needs_device = pytest.mark.skipif(bool(why_not_run(OPENCL)), reason=why_not_run(OPENCL))


def compile_kernels(kernels: Sequence[Kernel], spec: str = "opencl") -> tuple[str, dict[str, Any]]:
    """Return the source of kernels, and by number how each is started."""
    target = targets.get(spec)
    assert target.gpu is not None
    kind = target.gpu.kind
    functions = {}
    for number, kernel in enumerate(kernels):
        made = generator(kernel, target.gpu)
        function = made.build(kernel, target.gpu, made.knobs(kernel, target.gpu))
        functions[f"k{number}"] = function.with_attr("global_symbol", f"k{number}")
    with PassContext(config=DEVICE_CONFIG), recorded_kernels() as found:
        built = tvm.compile(IRModule(functions), Target(target.to_tvm()), tir_pipeline=DEVICE_PIPELINE)
    (device,) = built.mod._collect_from_import_tree(lambda module: module.kind == kind)
    return device.inspect_source(), {kernel.name.removesuffix("_kernel"): kernel for kernel in found}


def run_kernels(kernels: Sequence[Kernel], operands: Sequence[Sequence[Array]]) -> list[list[Array]]:
    """Run kernels, each once on its operands; return the outputs of each."""
    source, launches = compile_kernels(kernels)
    buffers: list[dict[str, Any]] = []
    arrays: dict[str, Array] = {}
    steps, outputs = [], []
    for number, (kernel, given) in enumerate(zip(kernels, operands, strict=True)):
        names: dict[str, int] = {}
        for index, array in enumerate(given):
            name, dtype = f"{number}.{index}", storage_dtype(kernel.inputs[index].dtype)
            names[f"x{index}"] = len(buffers)
            buffers.append({"kind": "input", "name": name, "dtype": dtype, "shape": list(kernel.inputs[index].shape)})
            arrays[name] = np.asarray(array, dtype).reshape(kernel.inputs[index].shape)
        for index, kind in enumerate(kernel.outputs):
            names[f"y{index}"] = len(buffers)
            fields = {"dtype": storage_dtype(kind.dtype), "shape": list(kind.shape)}
            outputs.append({"name": f"{number}.{index}", "buffer": len(buffers), **fields})
            buffers.append({"kind": "output", **fields})
        launch = launches[f"k{number}"]
        arguments = [names[name] for name in launch.arguments]
        steps.append({"kernel": launch.name, "arguments": arguments, "grid": launch.grid, "block": launch.block})
    program = {"source": "kernels.cl", "buffers": buffers, "outputs": outputs, "launches": steps}
    found = run_program(program, source, arrays, {})
    return [[found[f"{n}.{index}"] for index in range(len(kernel.outputs))] for n, kernel in enumerate(kernels)]


def errors(kernels: Sequence[Kernel], operands: Sequence[Sequence[Array]]) -> list[float]:
    """Return the largest error of each kernel against its reference, relative to its largest number or 1."""
    worst: list[float] = []
    for kernel, given, found in zip(kernels, operands, run_kernels(kernels, operands), strict=True):
        expected = kernel.reference(*given)
        pairs = zip(kernel.outputs, found, expected, strict=True)
        worst.append(max(_error(kind.dtype, made, wanted) for kind, made, wanted in pairs))
    return worst


def _error(dtype: str, made: Array, wanted: Array) -> float:
    """Infinite where something is not finite that should be, or the other way round."""
    values = from_bfloat16_bits(made) if dtype == "bfloat16" else made
    finite = np.isfinite(wanted)
    if not np.array_equal(np.isfinite(values), finite):
        return float("inf")
    scale = max(float(np.abs(wanted[finite]).max(initial=0.0)), 1.0)
    difference = values.astype(np.float64) - wanted.astype(np.float64)
    return float(np.abs(difference[finite]).max(initial=0.0)) / scale
