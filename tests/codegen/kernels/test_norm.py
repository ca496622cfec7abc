"""Norms and softmax over odd rows, with and without residual, scale and bias."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from codegen.kernels.base import Isa, View
from codegen.kernels.norm import NormKernel
from tests.codegen.kernels import checking
from tests.codegen.kernels.batches import ISAS, check_all, inputs_of

SHAPES = ((1, 1), (1, 16), (3, 5), (2, 200), (130, 128))
KERNELS = {
    f"{kind}-{rows}x{width}{'-residual' * residual}{'-scale' * scale}{'-bias' * bias}": NormKernel(
        rows, width, kind, 0.0 if kind == "softmax" else 1e-5, residual, scale, bias
    )
    for (rows, width), kind, residual in itertools.product(SHAPES, ("layer_norm", "rms_norm", "softmax"), (False, True))
    for scale, bias in ((False, False), (True, False), (True, True))[:: 1 + (kind == "rms_norm")]
    if kind != "softmax" or not (scale or residual)
    if rows != 1 or not (scale or bias)
}
WINDOWS = {
    "gate": NormKernel(3, 37, "rms_norm", 1e-5, scale=True, gate="silu"),
    "plain-gate": NormKernel(130, 16, "layer_norm", 1e-5, scale=True, bias=True, gate="identity"),
    "gate-window": NormKernel(6, 5, "rms_norm", 1e-5, gate="sigmoid", heads=3, gate_view=View(40, 21)),
    "both-windows": NormKernel(
        260, 20, "layer_norm", 1e-5, gate="silu", heads=2, x_view=View(99, 3), gate_view=View(43, 1)
    ),
    "rows": NormKernel(7, 33, "rms_norm", 1e-5, x_view=View(50, 17)),
    "softmax": NormKernel(8, 18, "softmax", heads=4, x_view=View(80, 8)),
}


@pytest.mark.parametrize("isa", ISAS)
def test_norm_equals_reference(isa: str) -> None:
    """Rows shorter than a vector, whole vectors and rests; the sum with the residual is written too."""
    check_all(KERNELS, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_norm_reads_windows_and_multiplies_by_its_gate(isa: str) -> None:
    """Heads side by side in a wider buffer, at any offset; the gate's activation is applied on the way."""
    check_all(WINDOWS, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_norm_every_knob_gives_the_same(isa: str) -> None:
    """However the rows are shared out, also where pieces differ in length, the result stands."""
    check_all({"rows": NormKernel(11, 37, "layer_norm", 1e-5, True, True, True)}, isa, every_knob=True)


def test_norm_threads_only_large_work() -> None:
    """A few rows run on the calling thread."""
    two = Isa("avx512", lanes=16, registers=32, threads=2)
    assert NormKernel(4, 64, "rms_norm").knobs(two) == {"pieces": 1}
    assert NormKernel(1024, 64, "rms_norm").knobs(two) == {"pieces": 8}


@pytest.mark.parametrize("isa", ISAS)
def test_norm_survives_extreme_rows(isa: str) -> None:
    """Large offsets, large logits, masked logits and constant rows give what float64 gives, never NaN."""
    softmax, norm = NormKernel(4, 37, "softmax"), NormKernel(3, 37, "layer_norm", 1e-5)
    logits = inputs_of(softmax)[0]
    logits[0] *= 1e4
    logits[1] -= 3e38
    logits[2, ::2] = -np.inf
    logits[3] = 88.0
    rows = inputs_of(norm)[0]
    rows[0] = 3.0
    rows[1] = 0.0
    rows[2] += 1000.0
    # Centring numbers near 1000 that float32 holds to 6e-5 leaves 1e-4 of them.
    check_all({"softmax": softmax, "norm": norm}, isa, inputs={"softmax": [logits], "norm": [rows]}, tolerance=1e-4)


@pytest.mark.parametrize("isa", [checking.NATIVE, "avx512", "avx2"])
@pytest.mark.parametrize(
    "kernel",
    [
        NormKernel(3, 37, "layer_norm", 1e-5, residual=True, scale=True, bias=True, out_dtype="bfloat16"),
        NormKernel(2, 48, "rms_norm", 1e-5, scale=True, out_dtype="bfloat16"),
        NormKernel(5, 33, "softmax", out_dtype="bfloat16"),
    ],
    ids=lambda kernel: kernel.kind,
)
def test_norm_rounds_its_rows_but_not_the_sum(kernel: NormKernel, isa: str) -> None:
    """The rows are rounded to bfloat16 when they are stored; the sum with the residual stays float32."""
    checking.check(kernel, isa)
