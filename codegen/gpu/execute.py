"""Running programs here, to verify them: OpenCL on a device or on PoCL, which is a processor that plays one.

A program runs in a process of its own: neither its crash nor the OpenCL platform's libraries touch the caller's.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from codegen.targets.base import Gpu
from ir.errors import KernelCrash, KernelTimeout

TIMEOUT_S: Final = 300.0
"""Bound on a run: a processor that plays a device takes minutes at most, most of it to compile."""
_PROBE_S: Final = 30.0
_CANNOT_COMPILE: Final = 3
_PROBE: Final = f"""
import sys, pyopencl as cl
device = next(device for platform in cl.get_platforms() for device in platform.get_devices())
try:
    cl.Program(cl.Context([device]), "__kernel void nothing() {{}}").build()
except cl.Error:
    sys.exit({_CANNOT_COMPILE})
"""
_HINT: Final = "`make gpu-deps` installs a processor that plays one"


def why_not_run(gpu: Gpu) -> str:
    """Say what is missing to run a program for a device here; empty where nothing is."""
    if gpu.kind != "opencl":
        return f"there is no {gpu.kind} device here"
    return _why_no_opencl()


@functools.cache
def _why_no_opencl() -> str:
    if importlib.util.find_spec("pyopencl") is None:
        return f"pyopencl is not installed here; {_HINT}"
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, timeout=_PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return "looking for an OpenCL device here takes too long"
    if done.returncode == _CANNOT_COMPILE:
        return "the OpenCL device here cannot compile an empty kernel; a PoCL older than the processor may not know it"
    return f"there is no OpenCL device here; {_HINT}" if done.returncode else ""


def run_program(
    program: Mapping[str, Any], source: str, inputs: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Run an OpenCL program once.

    Returns:
        The outputs by name.

    Raises:
        KernelCrash: The process ended otherwise than with 0, or the platform refused the source.
        KernelTimeout: It took too long.
    """
    with tempfile.TemporaryDirectory(prefix="nas-") as scratch:
        folder = Path(scratch)
        (folder / "program.json").write_text(json.dumps(program))
        (folder / program["source"]).write_text(source)
        arrays = {f"input.{name}": np.asarray(array) for name, array in inputs.items()}
        arrays |= {f"weight.{name}": np.asarray(array) for name, array in weights.items()}
        np.savez(folder / "arrays.npz", **arrays)  # pyright: ignore[reportArgumentType]  # names are no options of it
        command = [sys.executable, "-m", "codegen.gpu.opencl", str(folder)]
        root = Path(__file__).parents[2]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=root)
        except subprocess.TimeoutExpired:
            raise KernelTimeout("the program ran out of time", expected=f"at most {TIMEOUT_S:g} s") from None
        if done.returncode:
            found = f"exit status {done.returncode}: {done.stderr[-2000:]}"
            raise KernelCrash("the OpenCL program did not run", found=found)
        with np.load(folder / "outputs.npz") as outputs:
            return {name: outputs[name] for name in outputs.files}
