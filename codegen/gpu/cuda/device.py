"""The GPU of this machine, asked through the driver's library; a process without one gets a reason, never a crash.

Standard library only, since artifacts are loaded with no more.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Final

DRIVER: Final = "libcuda.so.1"
KDL_CUDA: Final = 2
"""DLPack's number of CUDA devices."""

_MAJOR, _MINOR, _MULTIPROCESSORS, _L2_BYTES = 75, 76, 16, 38  # CUdevice_attribute
_NAME_BYTES: Final = 256


@dataclass(frozen=True)
class CudaDevice:
    """The first GPU that this process sees.

    Attributes:
        name: As the driver calls it.
        capability: Compute capability, such as (9, 0).
        multiprocessors: Multiprocessors.
        l2_bytes: Bytes of the second-level cache.
        memory_bytes: Bytes of its memory.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int


@functools.cache
def find() -> CudaDevice | str:
    """Return the GPU, or a sentence that says what is missing."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return "there is no NVIDIA GPU here: no driver is installed"
    return describe(driver)


def describe(driver: ctypes.CDLL) -> CudaDevice | str:
    """Ask a driver's library for its first device."""
    count, device, number = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if not hasattr(driver, "cuInit"):
        return "there is no NVIDIA GPU here: no driver is installed"
    if (code := driver.cuInit(0)) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return f"there is no NVIDIA GPU here: the driver finds none (error {code})"
    driver.cuDeviceGet(ctypes.byref(device), 0)
    name, memory = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def ask(attribute: int) -> int:
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        return number.value

    capability = ask(_MAJOR), ask(_MINOR)
    return CudaDevice(name.value.decode(), capability, ask(_MULTIPROCESSORS), ask(_L2_BYTES), memory.value)


def why_not_run(architecture: str) -> str:
    """Say why code for an architecture cannot be run here; empty where it can."""
    found = find()
    if isinstance(found, str):
        return found
    if not runs(architecture, found.capability):
        return f"the GPU here, {found.name}, is sm_{found.capability[0]}{found.capability[1]}, not {architecture}"
    return ""


def capability(architecture: str) -> tuple[int, int]:
    """Return the compute capability of an architecture: `sm_100a` is (10, 0)."""
    digits = architecture.removeprefix("sm_").rstrip("a")
    return int(digits[:-1]), int(digits[-1])


def runs(architecture: str, device: tuple[int, int]) -> bool:
    """Tell whether machine code for an architecture runs on a device of a compute capability.

    It runs on later devices of the same first number; what is written for one generation alone, only there.
    """
    wanted = capability(architecture)
    if architecture.endswith("a"):
        return wanted == device
    return wanted[0] == device[0] and wanted[1] <= device[1]
