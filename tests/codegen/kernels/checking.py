"""Builds a kernel, runs it between guard zones and compares it with its float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from codegen import _tvm, machine, targets
from codegen.kernels.base import Isa, Kernel, Knobs
from codegen.targets.base import Target
from ir.errors import TargetUnavailable

GUARD = 256  # elements before and after each operand; a multiple of 64 bytes, the alignment that kernels expect
TOLERANCE = 1e-5  # of the output's scale: float32 sums of a few thousand products err by about 1e-6
ISAS = ("avx512", "avx2", "sse")


def target_of(isa: str, threads: int = 2) -> Target:
    """The target of an instruction set, or a skip where this machine lacks it."""
    try:
        return targets.get(f"cpu:{isa}", threads=min(threads, len(machine.available_cpus())))
    except TargetUnavailable as error:
        pytest.skip(str(error))


def random_inputs(kernel: Kernel, seed: int = 0) -> list[np.ndarray]:
    """Standard normal inputs; integer scalars are zero."""
    rng = np.random.default_rng(seed)
    return [
        np.zeros(t.shape, np.int32) if t.dtype == "int32" else rng.standard_normal(t.shape).astype(t.dtype)
        for t in kernel.inputs
    ]


def guarded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copy an array into the middle of a NaN-filled one; returns the copy and the whole."""
    dtype = array.dtype
    spare = 64 // dtype.itemsize
    whole = np.full(array.size + 2 * GUARD + spare, np.nan if dtype.kind == "f" else -1, dtype)
    start = GUARD + (-(whole.ctypes.data + GUARD * dtype.itemsize) % 64) // dtype.itemsize
    middle = whole[start : start + array.size].reshape(array.shape)
    middle[...] = array
    return middle, whole


def run(kernel: Kernel, arrays: Sequence[np.ndarray], target: Target, knobs: Knobs | None = None) -> list[np.ndarray]:
    """Compile and call a kernel; reads outside an operand meet NaN, writes outside fail here."""
    isa: Isa = replace(target.isa, threads=target.threads)
    knobs = kernel.knobs(isa) if knobs is None else knobs
    function = kernel.build(isa, knobs)
    library = _tvm.compile_functions({kernel.symbol: function}, _tvm.Target(target.to_tvm()))
    operands: list[np.ndarray] = []
    for index, array in enumerate(arrays):
        packed = kernel.pack(index, array, isa, knobs)
        assert (packed is not None) == kernel.packs(index)
        operands.append(array if packed is None else packed)
        assert operands[-1].shape == kernel.packed_shape(index, isa, knobs)
    operands += [np.full(t.shape, np.nan, t.dtype) for t in kernel.outputs]
    zones = [guarded(operand) for operand in operands]
    library[kernel.symbol](*(_tvm.tvm.runtime.from_dlpack(middle) for middle, _ in zones))
    for (middle, whole), operand in zip(zones, operands, strict=True):
        if operand.dtype.kind == "f":
            assert np.isnan(whole).sum() - np.isnan(middle).sum() == whole.size - middle.size, "wrote past an operand"
    return [middle.copy() for middle, _ in zones[len(arrays) :]]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest error as a share of the largest expected value; NaN counts as infinite."""
    error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
    return float(error) if np.isfinite(error) else np.inf


def check(
    kernel: Kernel,
    isa: str,
    *,
    inputs: Sequence[np.ndarray] | None = None,
    knobs: Knobs | None = None,
    threads: int = 2,
) -> None:
    """Assert that a kernel computes its reference to within the tolerance."""
    arrays = random_inputs(kernel) if inputs is None else inputs
    actual = run(kernel, arrays, target_of(isa, threads), knobs)
    expected = kernel.reference(*arrays)
    assert len(actual) == len(expected)
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        assert relative_error(got, wanted) <= TOLERANCE, kernel.key
