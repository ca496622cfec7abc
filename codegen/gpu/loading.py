"""Loading artifacts whose kernels run on a graphics processor: what has to be here, and where their tensors go.

Standard library and numpy only, as all that loads artifacts.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from codegen import tvm_runtime
from codegen.gpu.cuda import device
from codegen.gpu.cuda.timing import GpuStopwatch, GpuTiming, Runtime
from codegen.placement import DeviceMemory
from ir.errors import ArtifactError, TargetUnavailable

_CUDA_RUNTIME: Final = "libcudart.so.13"
_TVM_PART: Final = "libtvm_runtime_cuda.so"
_WAYS_OUT: Final = (
    "copy the file to a machine with such a GPU, or measure on one with --device host:port; "
    "`nas compile FILE --target cpu` makes an artifact for this machine"
)


def open_memory(target: Mapping[str, Any], where: str) -> DeviceMemory:
    """Return the memory that a loaded artifact's tensors go to.

    Args:
        target: What its manifest says of its target.
        where: The file, for errors.

    Raises:
        ArtifactError: The device is not here, or is another one.
        TargetUnavailable: Libraries that drive it are missing.
    """
    check_device(target, where)
    _load_cuda()
    return DeviceMemory(device.KDL_CUDA)


def check_device(target: Mapping[str, Any], where: str) -> None:
    """Check that the device of an artifact is here.

    Raises:
        ArtifactError: It is not, or is another one.
    """
    kind, model = target["gpu"]["kind"], target["gpu"]["model"]
    if kind != "cuda":
        raise ArtifactError(
            f"kernels of {kind} are not started from here",
            where=where,
            expected="an artifact for cpu or cuda",
            found=target["fingerprint"],
            hint="program.json inside says how a program of the device's own starts them",
        )
    reason = device.why_not_run(model)
    if reason:
        raise ArtifactError(
            "the artifact runs on an NVIDIA GPU",
            where=where,
            expected=f"a GPU for {model}",
            found=reason,
            hint=_WAYS_OUT,
        )


def stopwatch(timing: GpuTiming) -> GpuStopwatch:
    """Return what times models on the NVIDIA GPU of this machine.

    Raises:
        TargetUnavailable: There is none, or libraries that drive it are missing.
    """
    found = device.find()
    if isinstance(found, str):
        raise TargetUnavailable("latency on an NVIDIA GPU cannot be measured here", found=found, hint=_WAYS_OUT)
    runtime, _ = _load_cuda()
    set_stream = tvm_runtime.load().get_global_func("runtime.TVMSetStream")
    return GpuStopwatch(timing, Runtime(runtime), found.l2_bytes, lambda stream: set_stream(device.KDL_CUDA, 0, stream))


@functools.cache
def _load_cuda() -> tuple[ctypes.CDLL, ...]:
    """Load what drives the GPU: the CUDA runtime, then the part of TVM's that uses it.

    Raises:
        TargetUnavailable: One of them is missing.
    """
    tvm_runtime.load()
    hint = "pip install nvidia-cuda-runtime==13.*, or add the folder of the library to LD_LIBRARY_PATH"
    runtime = _open(_CUDA_RUNTIME, _runtime_folders(), hint)
    part = _open(_TVM_PART, _tvm_folders(), "install the package apache-tvm, or use a folder written by `nas bundle`")
    return runtime, part


def _open(name: str, folders: Iterator[Path], hint: str) -> ctypes.CDLL:
    reasons: list[str] = []
    for path in (*(str(folder / name) for folder in folders if (folder / name).exists()), name):
        try:
            return ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        except OSError as error:
            reasons.append(str(error))
    raise TargetUnavailable(
        "a library that drives the GPU cannot be loaded", where="cuda", expected=name, found=reasons[0], hint=hint
    )


def _runtime_folders() -> Iterator[Path]:
    yield tvm_runtime.NATIVE
    for folder in _package_folders("nvidia"):
        yield folder / "cu13" / "lib"
    yield Path("/usr/local/cuda/lib64")


def _tvm_folders() -> Iterator[Path]:
    yield tvm_runtime.NATIVE
    for folder in _package_folders("tvm"):
        yield folder / "lib"


def _package_folders(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
