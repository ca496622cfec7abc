"""Run a program of OpenCL launches: `python -m codegen.gpu.opencl FOLDER`.

Needs numpy and pyopencl, nothing else of this tool. The folder holds `program.json` (see `codegen.gpu.program`), the
source it names, and `arrays.npz` with inputs as `input.NAME` and weights as `weight.NAME`; `outputs.npz` is added.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def run(folder: Path) -> None:
    """Run the program of a folder on the first device there is."""
    cl: Any = importlib.import_module("pyopencl")
    program = json.loads((folder / "program.json").read_text())
    arrays = np.load(folder / "arrays.npz")
    device = next(device for platform in cl.get_platforms() for device in platform.get_devices())
    context = cl.Context([device])
    queue = cl.CommandQueue(context)
    built = cl.Program(context, (folder / program["source"]).read_text()).build(options="-cl-std=CL1.2")
    kernels = {name: cl.Kernel(built, name) for name in {launch["kernel"] for launch in program["launches"]}}
    buffers = [_allocate(cl, context, queue, buffer, arrays) for buffer in program["buffers"]]
    for launch in program["launches"]:
        sizes = [groups * threads for groups, threads in zip(launch["grid"], launch["block"], strict=True)]
        arguments = [buffers[number] for number in launch["arguments"]]
        kernels[launch["kernel"]](queue, sizes, launch["block"], *arguments)
    outputs: dict[str, np.ndarray] = {}
    for output in program["outputs"]:
        array = np.empty(output["shape"], output["dtype"])
        cl.enqueue_copy(queue, array, buffers[output["buffer"]])
        outputs[output["name"]] = array
    queue.finish()
    np.savez(folder / "outputs.npz", **outputs)  # pyright: ignore[reportArgumentType]  # names are no options of it


def _allocate(cl: Any, context: Any, queue: Any, buffer: dict[str, Any], arrays: Any) -> Any:
    """Allocate memory; what no kernel has written is not a number, so that reading it shows."""
    if buffer["kind"] == "storage":
        content = np.full(buffer["bytes"], 0xFF, np.uint8)
    elif buffer["kind"] == "output":
        content = np.full(int(np.prod(buffer["shape"])) * np.dtype(buffer["dtype"]).itemsize, 0xFF, np.uint8)
    else:
        content = np.ascontiguousarray(arrays[f"{buffer['kind']}.{buffer['name']}"], dtype=buffer["dtype"])
    made = cl.Buffer(context, cl.mem_flags.READ_WRITE, max(content.nbytes, 4))
    if content.nbytes:
        cl.enqueue_copy(queue, made, content)
    return made


if __name__ == "__main__":
    run(Path(sys.argv[1]))
