"""The other ways to run an artifact's graph, for `codegen.peers`, which imports this in its worker process only.

Each runner takes the torch module, the inputs, the number of threads and a scratch folder, and returns the call to time
and a function that fetches the outputs of the last call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch._inductor import config as inductor

from codegen.container import Contents
from codegen.torch_backend import to_module
from ir.serialize import graph_from_json

Inputs: TypeAlias = Mapping[str, np.ndarray]
Runner: TypeAlias = tuple[Callable[[], Any], Callable[[], list[np.ndarray]]]


class Positional(torch.nn.Module):
    """The graph of an artifact with arguments by position and a tuple of outputs, as exporters want it."""

    def __init__(self, contents: Contents, threads: int) -> None:
        super().__init__()
        torch.set_num_threads(threads)
        function = contents.manifest["functions"]["forward"]
        self.names = [item["name"] for item in function["inputs"]]
        self.outputs = [item["name"] for item in function["outputs"]]
        self.inner = to_module(graph_from_json(contents.graph_json), contents.parameters)
        self.eval().requires_grad_(False)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the outputs in the artifact's order."""
        results = self.inner(**dict(zip(self.names, tensors, strict=True)))
        return tuple(results[name] for name in self.outputs)


def eager(module: Positional, inputs: Inputs, threads: int, folder: Path) -> Runner:
    """Run the module as it is."""
    del threads, folder
    return _torch_runner(module, inputs)


def compiled(module: Positional, inputs: Inputs, threads: int, folder: Path) -> Runner:
    """Run the module through inductor, with weights folded and packed in advance, as a deployment would."""
    del threads, folder
    inductor.freezing = True
    return _torch_runner(torch.compile(module, dynamic=False, fullgraph=True), inputs)


def onnxruntime(module: Positional, inputs: Inputs, threads: int, folder: Path) -> Runner:
    """Run the exported module in ONNX Runtime, with inputs and outputs bound."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(_export(module, inputs, folder), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for node, array in zip(session.get_inputs(), inputs.values(), strict=True):
        binding.bind_cpu_input(node.name, np.ascontiguousarray(array))
    for node in session.get_outputs():
        binding.bind_output(node.name)
    return lambda: session.run_with_iobinding(binding), binding.copy_outputs_to_cpu


def openvino(module: Positional, inputs: Inputs, threads: int, folder: Path) -> Runner:
    """Run the exported module in OpenVINO, in float32 even where the processor has bfloat16."""
    ov = importlib.import_module("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = ov.Core().compile_model(_export(module, inputs, folder), "CPU", settings)
    request = model.create_infer_request()
    for index, array in enumerate(inputs.values()):
        request.set_input_tensor(index, ov.Tensor(np.array(array)))
    return request.infer, lambda: [np.array(request.get_output_tensor(i).data) for i in range(len(model.outputs))]


RUNNERS: Mapping[str, Callable[[Positional, Inputs, int, Path], Runner]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def _torch_runner(module: Callable[..., Any], inputs: Inputs) -> Runner:
    tensors = tuple(_tensor(array) for array in inputs.values())

    def call() -> Any:
        with torch.no_grad():
            return module(*tensors)

    return call, lambda: [output.numpy() for output in call()]


def _export(module: Positional, inputs: Inputs, folder: Path) -> str:
    """Export once for all that read ONNX."""
    path = folder / "model.onnx"
    if not path.exists():
        tensors = tuple(_tensor(array) for array in inputs.values())
        torch.onnx.export(module, tensors, str(path), dynamo=True, verbose=False)
    return str(path)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Copy an array: those of an artifact are read-only."""
    return torch.from_numpy(np.array(array))
