"""Trials of one kernel candidate at a time: build it, check it, time it. Everything here runs in worker processes.

A candidate is built to a library file by any worker; the worker that has the device to itself loads, checks and times
it. Timing is short where a candidate is clearly slower than the best so far, and thorough, in turns, for the few that
may be chosen.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from codegen import _tvm
from codegen.container import relative_error
from codegen.kernels.base import Array, Kernel, Knobs
from codegen.measure import time_call, warm_up
from codegen.targets.base import Target
from ir.errors import VerificationError
from ir.rounding import bfloat16_bits, from_bfloat16_bits

TOLERANCE: Final = 1e-4  # of the output's scale, in float32; the same as for whole models
STORED_TOLERANCE: Final = 2.0**-8  # of what is stored as bfloat16: half a place is 2^-9 of a number
ROUNDS: Final = 7  # of a comparison

_WARM_UP_S: Final = 0.005  # TVM's threads sleep at first
_SAMPLE_S: Final = 0.015  # finds who may be chosen; turns decide
_FEWEST_SAMPLES: Final = 5
_ENOUGH_OF_SLOW: Final = 3
_CLEARLY_SLOWER: Final = 1.3  # far beyond the noise of three samples
_TURN_S: Final = 0.008
_LARGEST_SANE: Final = 1e4

Candidate = tuple[Knobs, str]
"""Knobs, and the library file that was built with them."""


def build_candidate(kernel: Kernel, target: Target, candidate: Candidate) -> None:
    """Build a candidate's library."""
    knobs, path = candidate
    function = kernel.build(target.isa, knobs)
    executable = _tvm.compile_functions({"candidate": function}, _tvm.Target(target.to_tvm()))
    executable.export_library(path, options=["-nostdlib", "-lm"])  # linking takes 5 ms, with all of C++ beside it 18


def time_candidate(kernel: Kernel, target: Target, candidate: Candidate, best_ms: float) -> float:
    """Check a candidate and return its time in milliseconds.

    Args:
        kernel: The workload.
        target: What it was built for.
        candidate: Knobs and library.
        best_ms: The best time so far; a candidate that is clearly slower is timed a few times only.

    Raises:
        VerificationError: It computes something else than the kernel's reference.
    """
    run = _runnable(kernel, target, candidate)
    group = warm_up(run, _WARM_UP_S, fewest=1)
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < _FEWEST_SAMPLES or time.perf_counter() - start < _SAMPLE_S:
        samples.append(time_call(run, group) * 1e3)
        if len(samples) >= _ENOUGH_OF_SLOW and min(samples) > _CLEARLY_SLOWER * best_ms:
            break
    return float(np.percentile(samples, 10))  # what other processes add must not decide between candidates


def compare(kernel: Kernel, target: Target, candidates: Sequence[Candidate]) -> list[list[float]]:
    """Time candidates in turns: what slows the machine down slows them all.

    Returns:
        For each of `ROUNDS` rounds, the milliseconds of each candidate.
    """
    runs = [_runnable(kernel, target, candidate) for candidate in candidates]
    groups = [max(warm_up(run, _WARM_UP_S, fewest=1), math.ceil(_TURN_S / time_call(run))) for run in runs]
    return [[time_call(run, group) * 1e3 for run, group in zip(runs, groups, strict=True)] for _ in range(ROUNDS)]


def sample_operands(kernel: Kernel) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Draw operands on which the kernel's reference stays in range, and the reference's results.

    A recurrence grows without bound where its decays exceed one. Whether an operand is a decay, and whether as a
    logarithm, is the kernel's own affair, so draws of both signs, of negative and of small positive numbers are tried.
    """
    rng = np.random.default_rng(0)
    draws: tuple[Callable[[tuple[int, ...]], Array], ...] = (
        lambda shape: rng.standard_normal(shape),
        lambda shape: -np.abs(rng.standard_normal(shape)),
        lambda shape: rng.uniform(0.1, 0.9, shape),
    )
    inputs: tuple[Array, ...] = ()
    results: tuple[Array, ...] = ()
    for draw in draws:
        inputs = tuple(_draw(draw, rng, operand.shape, operand.dtype) for operand in kernel.inputs)
        with np.errstate(all="ignore"):
            results = kernel.reference(*inputs)
        if all(bool(np.all(np.abs(result) < _LARGEST_SANE)) for result in results):
            break
    return inputs, results


def _draw(
    draw: Callable[[tuple[int, ...]], Array], rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> Array:
    if dtype == "bfloat16":
        return bfloat16_bits(draw(shape))
    if np.dtype(dtype).kind == "f":
        return draw(shape).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)  # an index into any table of two rows or more


def _runnable(kernel: Kernel, target: Target, candidate: Candidate) -> Callable[[], object]:
    """Load a candidate, check it against the reference, and return its bare call."""
    knobs, path = candidate
    run = _tvm.tvm.runtime.load_module(path)["candidate"]
    inputs, tensors, expected = _operands(kernel)
    given = [_given(kernel, i, array, tensors[i], target, knobs) for i, array in enumerate(inputs)]
    outputs = [_tvm.device_array(_poisoned(operand.shape, operand.dtype)) for operand in kernel.outputs]
    run(*given, *outputs)
    for kind, found, right in zip(kernel.outputs, outputs, expected, strict=True):
        stored = kind.dtype == "bfloat16"
        tolerance = STORED_TOLERANCE if stored else TOLERANCE
        error = relative_error(from_bfloat16_bits(found.numpy()) if stored else found.numpy(), right)
        if not error <= tolerance:
            limit = f"an error of at most {tolerance:g} of the output's scale"
            raise VerificationError("the kernel disagrees with its reference", expected=limit, found=f"{error:g}")
    return lambda: run(*given, *outputs)


@functools.lru_cache(maxsize=1)
def _operands(kernel: Kernel) -> tuple[tuple[Array, ...], tuple[object, ...], tuple[Array, ...]]:
    """Operands as arrays and as tensors, and the right results: the same for all candidates of a kernel."""
    inputs, expected = sample_operands(kernel)
    return inputs, tuple(_tvm.device_array(array) for array in inputs), expected


def _given(kernel: Kernel, index: int, array: Array, tensor: object, target: Target, knobs: Knobs) -> object:
    packed = kernel.pack(index, array, target.isa, knobs)
    return tensor if packed is None else _tvm.device_array(packed)


def _poisoned(shape: tuple[int, ...], dtype: str) -> Array:
    """Return an output buffer that shows where nothing was written."""
    if dtype == "bfloat16":
        return bfloat16_bits(np.full(shape, np.nan))
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -1, dtype)
