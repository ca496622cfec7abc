"""Kernels of graphics processors, run through OpenCL on whatever device is here, against numpy in float64.

The cases are those of the processor's kernels: every operation, option and odd size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from codegen.gpu.registry import GENERATORS
from codegen.kernels.base import Kernel
from codegen.kernels.gemm import GemmKernel
from codegen.kernels.topk import TopKKernel
from codegen.kernels.vector_math import ACTIVATIONS
from tests.codegen import gpu_checking
from tests.codegen.kernels import (
    checking,
    test_attention,
    test_attention_bfloat16,
    test_delta_scan,
    test_fft,
    test_fused,
    test_gemm,
    test_gemm_bfloat16,
    test_nest,
    test_norm,
    test_recurrence,
    test_scan,
    test_scatter,
    test_softmax,
    test_topk,
    test_window,
)
from tests.codegen.kernels.batches import inputs_of

TOLERANCE = 2e-5  # of the output's scale: sums of some thousand products, each rounded to float32
ROUNDED_TOLERANCE = 2e-2  # four roundings of 2^-9, of which those of scores are exponentiated

Draw = Callable[[Any], list[np.ndarray]]


def decaying(kernel: Any) -> list[np.ndarray]:
    """Factors below one, so that nothing overflows."""
    *decays, updates = inputs_of(kernel)
    return [*(1.0 / (1.0 + np.exp(-decay)) for decay in decays), updates]


def rope_inputs(kernel: Any) -> list[np.ndarray]:
    """Random heads, the table, and a position near its end."""
    inputs = test_attention.inputs_of(kernel)
    return [inputs[0], kernel.table(), *inputs[2:]]


ACTIVATED = {name: GemmKernel(5, 21, 18, bias=True, activation=name) for name in ACTIVATIONS}
TOP_K = {f"{rows}x{width}": TopKKernel(rows, width, k, largest=width % 3 != 0) for rows, width, k in test_topk.SHAPES}
GROUPS: dict[str, tuple[Mapping[str, Kernel], Draw, float]] = {
    "attention": (test_attention.CASES, test_attention.inputs_of, TOLERANCE),
    "attention_bfloat16": (test_attention_bfloat16.CASES, checking.random_inputs, ROUNDED_TOLERANCE),
    "batch_gemm": (test_gemm.BATCHES, checking.random_inputs, TOLERANCE),
    "chains": (test_fused.TABLE, inputs_of, TOLERANCE),
    "delta_scan": (test_delta_scan.KERNELS, test_delta_scan.delta_inputs, TOLERANCE),
    "fft": (test_fft.FFTS, test_fft.fft_inputs, TOLERANCE),
    "gemm": (test_gemm.GEMMS | ACTIVATED, checking.random_inputs, TOLERANCE),
    "gemm_bfloat16": (test_gemm_bfloat16.GEMMS, checking.random_inputs, ROUNDED_TOLERANCE),
    "long_conv": (test_fft.LONG, test_fft.long_inputs, TOLERANCE),
    "nest": (test_nest.KERNELS, inputs_of, TOLERANCE),
    "norm": (test_norm.KERNELS | test_norm.WINDOWS, inputs_of, TOLERANCE),
    "outer_scan": (test_recurrence.OUTER, test_recurrence.outer_inputs, TOLERANCE),
    "rope": (test_attention.ROPES, rope_inputs, TOLERANCE),
    "scan": (test_scan.KERNELS, decaying, TOLERANCE),
    "scatter": (test_scatter.KERNELS, test_scatter.inputs_of, TOLERANCE),
    "selective_scan": (test_recurrence.SELECTIVE, test_recurrence.selective_inputs, TOLERANCE),
    "softmax": (test_softmax.KERNELS, inputs_of, TOLERANCE),
    "top_k": (TOP_K, inputs_of, TOLERANCE),
    "window": (test_window.KERNELS, inputs_of, TOLERANCE),
}
QUICK = {
    "attention": "causal_grouped",
    "batch_gemm": "transposed_b",
    "chains": "Gelu",
    "delta_scan": "plain",
    "fft": "rfft-2x15x4",
    "gemm": "tails_everywhere",
    "long_conv": "short_filter",
    "norm": "rows",
    "outer_scan": "decay_of_keys",
    "rope": "plain",
    "scan": "decay-3x11x37",
    "scatter": "rows",
    "selective_scan": "everything",
    "softmax": "3x11x37",
    "top_k": "3x33",
    "window": "depthwise_2d",
}
"""A case of each family, for a test that takes seconds."""


def check(cases: Mapping[str, tuple[Kernel, list[np.ndarray]]], tolerance: float) -> None:
    """Run cases in one process and assert that each is near its reference."""
    kernels, operands = zip(*cases.values(), strict=True)
    found = gpu_checking.errors(kernels, operands)
    assert {name: error for name, error in zip(cases, found, strict=True) if not error <= tolerance} == {}


@gpu_checking.needs_device
def test_a_kernel_of_each_family_equals_its_reference() -> None:
    """One case of each gives the float64 result, and writes all of its outputs."""
    chosen = {group: (GROUPS[group][0][name], GROUPS[group][1]) for group, name in QUICK.items()}
    check({group: (kernel, draw(kernel)) for group, (kernel, draw) in chosen.items()}, TOLERANCE)


@gpu_checking.needs_device
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_kernels_equal_their_reference(group: str) -> None:
    """Every operation, option and odd size of a family gives the float64 result."""
    kernels, draw, tolerance = GROUPS[group]
    check({name: (kernel, draw(kernel)) for name, kernel in kernels.items()}, tolerance)


def test_every_family_has_cases() -> None:
    """No generator is left without one."""
    seen = {type(kernel) for kernels, _, _ in GROUPS.values() for kernel in kernels.values()}
    assert sorted(kind.__name__ for kind in set(GENERATORS) - seen) == []


@gpu_checking.needs_device
def test_equal_elements_come_in_the_order_of_their_positions() -> None:
    """Selection is stable: of ties the lower position is first, exactly."""
    kernels = [TopKKernel(3, 33, 9), TopKKernel(2, 40, 40, largest=False)]
    operands = [[np.random.default_rng(0).integers(-3, 4, kernel.inputs[0].shape)] for kernel in kernels]
    for kernel, given, found in zip(kernels, operands, gpu_checking.run_kernels(kernels, operands), strict=True):
        for made, wanted in zip(found, kernel.reference(*given), strict=True):
            np.testing.assert_array_equal(made, wanted)
