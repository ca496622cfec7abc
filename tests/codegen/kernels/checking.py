"""Builds a kernel, runs it between guard zones and compares it with its float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from codegen import _tvm, machine, targets
from codegen.kernels.base import Isa, Kernel, Knobs, storage_dtype
from codegen.targets.base import Target
from ir.errors import TargetUnavailable
from ir.rounding import bfloat16_bits, from_bfloat16_bits
from ir.types import TensorType

GUARD = 256  # elements before and after each operand; a multiple of 64 bytes, the alignment that kernels expect
TOLERANCE = 1e-5  # of the output's scale: float32 sums of a few thousand products err by about 1e-6
STORED_TOLERANCE = 2.0**-8  # of numbers stored as bfloat16: half a place is 2^-9 of a number
BFLOAT16_NAN = 0x7FC0
ISAS = ("avx512", "avx2", "sse")
NATIVE = "native"


def target_of(isa: str, threads: int = 2) -> Target:
    """The target of an instruction set, or a skip where this machine lacks it.

    The levels of `ISAS` are portable: no bfloat16 instructions, which `NATIVE`, all that this machine has, must have.
    """
    if isa == NATIVE:
        target = targets.get("cpu", threads=min(threads, len(machine.available_cpus())))
        if not target.isa.bf16_dot:
            pytest.skip("this machine has no bfloat16 instructions")
        return target
    try:
        return targets.get(f"cpu:{isa}", threads=min(threads, len(machine.available_cpus())))
    except TargetUnavailable as error:
        pytest.skip(str(error))


def random_inputs(kernel: Kernel, seed: int = 0) -> list[np.ndarray]:
    """Standard normal inputs; integer scalars are zero."""
    rng = np.random.default_rng(seed)

    def draw(kind: TensorType) -> np.ndarray:
        if kind.dtype == "int32":
            return np.zeros(kind.shape, np.int32)
        numbers = rng.standard_normal(kind.shape)
        return bfloat16_bits(numbers) if kind.dtype == "bfloat16" else numbers.astype(kind.dtype)

    return [draw(kind) for kind in kernel.inputs]


def poison(dtype: np.dtype[Any] | str) -> float:
    """What no kernel may read or leave behind: not a number, or -1."""
    kind = np.dtype(dtype)
    return np.nan if kind.kind == "f" else BFLOAT16_NAN if kind == np.uint16 else -1


def guarded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copy an array into the middle of a NaN-filled one; returns the copy and the whole."""
    dtype = array.dtype
    spare = 64 // dtype.itemsize
    whole = np.full(array.size + 2 * GUARD + spare, poison(dtype), dtype)
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
    operands += [np.full(t.shape, poison(storage_dtype(t.dtype)), storage_dtype(t.dtype)) for t in kernel.outputs]
    zones = [guarded(operand) for operand in operands]
    library[kernel.symbol](*(_tvm.tvm.runtime.from_dlpack(middle) for middle, _ in zones))
    for (middle, whole), operand in zip(zones, operands, strict=True):
        missing = np.isnan if operand.dtype.kind == "f" else partial(np.equal, poison(operand.dtype))
        assert missing(whole).sum() - missing(middle).sum() == whole.size - middle.size, "wrote past an operand"
    results = [middle.copy() for middle, _ in zones[len(arrays) :]]
    return [from_bfloat16_bits(result) if result.dtype == np.uint16 else result for result in results]


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
    for got, wanted, kind in zip(actual, expected, kernel.outputs, strict=True):
        assert got.shape == wanted.shape
        allowed = STORED_TOLERANCE if kind.dtype == "bfloat16" else TOLERANCE
        assert relative_error(got, wanted) <= allowed, kernel.key
