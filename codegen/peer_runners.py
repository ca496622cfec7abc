"""The other ways to run a graph, for comparisons, which import this in their worker process only.

Each runner takes the torch module, the inputs and the setting, and returns the call to time and a function that fetches
the outputs of a call in float32.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch._inductor import config as inductor

from codegen.measure import time_call
from codegen.torch_backend import to_module
from ir.errors import InputError, TargetUnavailable
from ir.graph import Graph

Inputs: TypeAlias = Mapping[str, np.ndarray]
Runner: TypeAlias = tuple[Callable[[], Any], Callable[[], list[np.ndarray]]]


@dataclass(frozen=True)
class Setting:
    """Under what conditions a peer runs.

    Attributes:
        threads: Threads.
        folder: Scratch folder; peers that read ONNX share the file `model.onnx` there, exported by the first of them.
        precision: `float32`, or `bfloat16` where products may round their operands to it.
        isa: Instruction set to keep to, the machine's own when None.
    """

    threads: int
    folder: Path
    precision: str = "float32"
    isa: str | None = None

    @property
    def onnx_path(self) -> Path:
        """Where the exported model lies."""
        return self.folder / "model.onnx"


class Positional(torch.nn.Module):
    """A graph with arguments by position and a tuple of outputs, as exporters want it."""

    def __init__(self, graph: Graph, parameters: Mapping[str, np.ndarray], threads: int) -> None:
        super().__init__()
        torch.set_num_threads(threads)
        self.names = list(graph.inputs)
        self.outputs = [name for name, _ in graph.outputs]
        self.inner = to_module(graph, parameters)
        self.eval().requires_grad_(False)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the outputs in the graph's order."""
        results = self.inner(**dict(zip(self.names, tensors, strict=True)))
        return tuple(results[name] for name in self.outputs)


def eager(module: Positional, inputs: Inputs, setting: Setting) -> Runner:
    """Run the module as it is; in bfloat16 wholly in that type or under autocast, whichever is faster."""
    if setting.precision == "float32":
        return _torch_runner(module, inputs)
    runners = [_torch_runner(module, inputs, autocast=True)]
    whole = _torch_runner(copy.deepcopy(module).to(torch.bfloat16), inputs, dtype=torch.bfloat16)
    try:
        whole[0]()
    except RuntimeError:  # torch mixes no types in some of its functions
        return runners[0]
    return min(*runners, whole, key=lambda runner: min(time_call(runner[0]) for _ in range(3)))


def compiled(module: Positional, inputs: Inputs, setting: Setting) -> Runner:
    """Run the module through inductor, with weights folded and packed in advance, as a deployment would."""
    inductor.freezing = True
    if setting.isa == "avx2":
        inductor.cpp.simdlen = 256
        inductor.cpp.march = "x86-64-v3"
    call = torch.compile(module, dynamic=False, fullgraph=True)
    return _torch_runner(call, inputs, autocast=setting.precision == "bfloat16")


def onnxruntime(module: Positional, inputs: Inputs, setting: Setting) -> Runner:
    """Run the exported module in ONNX Runtime, with inputs and outputs bound."""
    if setting.precision != "float32":
        raise InputError("its CPU kernels have no bfloat16, and float32 would be another model")
    if setting.isa is not None:
        raise TargetUnavailable("its matrix library chooses instructions by itself; no setting limits it")
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.inter_op_num_threads = 1
    path = _exported(module, inputs, setting)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for node, array in zip(session.get_inputs(), inputs.values(), strict=True):
        binding.bind_cpu_input(node.name, np.ascontiguousarray(array))
    for node in session.get_outputs():
        binding.bind_output(node.name)
    return lambda: session.run_with_iobinding(binding), binding.copy_outputs_to_cpu


def openvino(module: Positional, inputs: Inputs, setting: Setting) -> Runner:
    """Run the exported module in OpenVINO, in float32 unless bfloat16 is asked for, even where the processor has it."""
    ov = importlib.import_module("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": setting.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if setting.precision == "bfloat16" else "f32",
    }
    model = ov.Core().compile_model(_exported(module, inputs, setting), "CPU", settings)
    if setting.isa == "avx2":
        _check_limited(model)
    request = model.create_infer_request()
    for index, array in enumerate(inputs.values()):
        request.set_input_tensor(index, ov.Tensor(np.array(array)))
    return request.infer, lambda: [np.array(request.get_output_tensor(i).data) for i in range(len(model.outputs))]


RUNNERS: Mapping[str, Callable[[Positional, Inputs, Setting], Runner]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def export(module: Positional, inputs: Inputs, path: Path) -> None:
    """Write the module as ONNX."""
    tensors = tuple(_tensor(array) for array in inputs.values())
    torch.onnx.export(module, tensors, str(path), dynamo=True, verbose=False)


def _exported(module: Positional, inputs: Inputs, setting: Setting) -> str:
    """Export once for all that read ONNX."""
    if not setting.onnx_path.exists():
        export(module, inputs, setting.onnx_path)
    return str(setting.onnx_path)


def _torch_runner(
    module: Callable[..., Any], inputs: Inputs, *, autocast: bool = False, dtype: torch.dtype | None = None
) -> Runner:
    tensors = tuple(_tensor(array) for array in inputs.values())
    if dtype is not None:
        tensors = tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)

    def call() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            return module(*tensors)

    def outputs() -> list[np.ndarray]:
        return [(item.float() if item.is_floating_point() else item).numpy() for item in call()]

    return call, outputs


def _check_limited(model: Any) -> None:
    """Refuse a model with kernels that were chosen beyond AVX2."""
    for node in model.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        kind = str(facts["primitiveType"].value) if "primitiveType" in facts else ""
        if "avx512" in kind:
            raise TargetUnavailable("its kernels could not be limited", expected="AVX2", found=kind)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Copy an array: those of an artifact are read-only."""
    return torch.from_numpy(np.array(array))
