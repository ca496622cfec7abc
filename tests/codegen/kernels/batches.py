"""Compiles many kernels into one library, which costs little more than one, and holds each against its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from codegen import _tvm
from codegen.kernels.base import Kernel, Knobs
from tests.codegen.kernels.checking import GUARD, TOLERANCE, guarded, target_of

ISAS = ("avx512", "avx2")


def inputs_of(kernel: Kernel, seed: int = 0) -> list[np.ndarray]:
    """Standard normal numbers; whole numbers below 2, which index any table of two rows."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal(t.shape).astype(np.float32)
        if t.is_float
        else np.asarray(rng.integers(0, 2, t.shape), t.dtype)
        for t in kernel.inputs
    ]


def check_all(
    kernels: Mapping[str, Kernel],
    isa: str,
    *,
    inputs: Mapping[str, Sequence[np.ndarray]] | None = None,
    every_knob: bool = False,
    tolerance: float = TOLERANCE,
) -> None:
    """Assert that each kernel computes its reference between guard zones; skips where the machine lacks the isa.

    Args:
        kernels: Kernels by case name.
        isa: Instruction set to build for.
        inputs: Operands of some cases; random for the others.
        every_knob: Whether to build every alternative of the knob space, not the rule's choice alone.
        tolerance: Largest error, relative to the largest expected number or 1.
    """
    target = target_of(isa)
    isa_of_target = replace(target.isa, threads=target.threads)
    built: dict[str, tuple[str, _tvm.PrimFunc]] = {}
    knobs_of: dict[str, Knobs] = {}
    for name, kernel in kernels.items():
        space = kernel.knob_space(isa_of_target) if every_knob else [kernel.knobs(isa_of_target)]
        assert space[0] == kernel.knobs(isa_of_target)
        for index, knobs in enumerate(space):
            symbol = f"k{len(built)}_{index}"
            built[symbol] = (name, kernel.build(isa_of_target, knobs))
            knobs_of[symbol] = knobs
    functions = {symbol: function for symbol, (_, function) in built.items()}
    library = _tvm.compile_functions(functions, _tvm.Target(target.to_tvm()))
    wrong: dict[str, str] = {}
    for symbol, (name, _) in built.items():
        operands = (inputs or {}).get(name) or inputs_of(kernels[name])
        packed = [kernels[name].pack(i, array, isa_of_target, knobs_of[symbol]) for i, array in enumerate(operands)]
        as_built = [array if own is None else own for array, own in zip(operands, packed, strict=True)]
        complaint = _complaint(library[symbol], kernels[name], operands, as_built, tolerance)
        if complaint:
            wrong[f"{name} {kernels[name].key}"] = complaint
    assert not wrong


def _complaint(
    function: object,
    kernel: Kernel,
    operands: Sequence[np.ndarray],
    as_built: Sequence[np.ndarray],
    tolerance: float,
) -> str:
    assert callable(function)
    poisoned = [np.full(t.shape, np.nan if t.is_float else 99, _numpy(t.dtype)) for t in kernel.outputs]
    zones = [guarded(array) for array in (*as_built, *poisoned)]
    function(*(_tvm.tvm.runtime.from_dlpack(middle) for middle, _ in zones))
    for middle, whole in zones:
        outside = np.array(whole)
        start = (middle.ctypes.data - whole.ctypes.data) // whole.dtype.itemsize
        assert start >= GUARD
        outside[start : start + middle.size] = (
            np.nan if whole.dtype.kind == "f" else np.full((), -1).astype(whole.dtype)
        )
        if not np.all(np.isnan(outside) if whole.dtype.kind == "f" else outside == np.full((), -1).astype(whole.dtype)):
            return "wrote outside an operand"
    with np.errstate(all="ignore"):
        expected = kernel.reference(*operands)
    for (found, _), right in zip(zones[len(operands) :], expected, strict=True):
        if found.shape != right.shape:
            return f"shape {found.shape}, expected {right.shape}"
        if not np.array_equal(np.isfinite(found), np.isfinite(right)):
            return "not finite, or not written"
        wide, finite = right.astype(np.float64), np.isfinite(right)
        error = np.abs(found.astype(np.float64) - wide)[finite].max(initial=0.0)
        if not error <= tolerance * max(np.abs(wide[finite]).max(initial=0.0), 1.0):
            return f"error {error:g}"
    return ""


def _numpy(dtype: str) -> type:
    return {"float32": np.float32, "int32": np.int32, "bool": np.bool_}[dtype]
