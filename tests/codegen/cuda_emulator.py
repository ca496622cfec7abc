"""Runs CUDA kernels on the CPU: the compiler's own text, with `cuda_emulation/emulate.h` in place of CUDA's headers.

What the header covers and what not stands at its top: layouts, indices, waits and barriers are checked; races, memory
ordering and speed are not.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codegen.gpu import cuda
from codegen.gpu.cuda.kernels import CudaKernel

SOURCES = Path(cuda.__file__).parent / "sources"
HEADERS = Path(__file__).parent / "cuda_emulation"


class Strides(ctypes.Structure):
    """Elements between neighbours: batch, token, head."""

    _fields_ = (("batch", ctypes.c_int64), ("token", ctypes.c_int64), ("head", ctypes.c_int64))


class GateStrides(ctypes.Structure):
    """The same for gates, with the features of a head."""

    _fields_ = (*Strides._fields_, ("feature", ctypes.c_int64))


class TensorMap(ctypes.Structure):
    """A tensor as bulk copies see it, its fastest axis first; swizzled by 128 bytes."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("rank", ctypes.c_int32),
        ("swizzled", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
        ("box", ctypes.c_int32 * 4),
        ("unused", ctypes.c_char * 32),  # to a multiple of 64 bytes
    )

    @classmethod
    def of(cls, array: np.ndarray, box: Sequence[int]) -> TensorMap:
        """Describe an array of 16-bit elements."""
        sizes, strides = array.shape[::-1], array.strides[::-1]
        rank = len(sizes)
        rest = (0,) * (4 - rank)
        made = (ctypes.c_int64 * 4)(*sizes), (ctypes.c_int64 * 4)(*strides), (ctypes.c_int32 * 4)(*box, *rest)
        return cls(array.ctypes.data, rank, 1, *made)


_SCALARS: dict[str, Any] = {"int": ctypes.c_int, "float": ctypes.c_float}


def run(kernel: CudaKernel, grid: Sequence[int], *arguments: Any) -> None:
    """Run a kernel; arrays are changed in place.

    Args:
        kernel: What to run.
        grid: Blocks along x, y and z.
        *arguments: A contiguous array or None for a pointer, a number, or a structure of strides.
    """
    kinds = [
        _SCALARS.get(kind) or (ctypes.c_void_p if kind.endswith("*") else type(value))
        for (kind, _), value in zip(kernel.arguments, arguments, strict=True)
    ]
    function = getattr(_library(kernel), f"run_{kernel.entry}")
    function.argtypes = [ctypes.c_uint] * 3 + kinds
    function.restype = None
    function(*grid, *(a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments))


@functools.cache
def _library(kernel: CudaKernel) -> ctypes.CDLL:
    arguments = ", ".join(f"{kind} {name}" for kind, name in kernel.arguments)
    names = ", ".join(name for _, name in kernel.arguments)
    source = (
        f'{kernel.source}\nextern "C" void run_{kernel.entry}(unsigned x, unsigned y, unsigned z, {arguments}) {{\n'
        f"  emulation::launch(dim3(x, y, z), {kernel.threads}, {kernel.shared_bytes}, [=] {{ "
        f"{kernel.entry}({names}); }});\n}}\n"
    )
    folder = Path(tempfile.mkdtemp(prefix="nas-emulation-"))
    path = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:12]}.cc"
    path.write_text(source)
    command = ["g++", "-std=c++17", "-O2", "-g", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-DNAS_EMULATE"]
    command += [f"-I{HEADERS}", f"-I{SOURCES}", str(path), "-o", str(path.with_suffix(".so"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-4000:]
    return ctypes.CDLL(str(path.with_suffix(".so")))


def to_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round to 16 bits; the result holds the bits."""
    if dtype == "float16":
        return array.astype(np.float16).view(np.uint16)
    wide = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Return the float64 values of such bits."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
