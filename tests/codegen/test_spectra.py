"""Fourier transforms and long convolutions inside whole graphs, compiled and run."""

from __future__ import annotations

import numpy as np
import pytest

from codegen.selection.select import select
from ir.builder import Builder, Tensor
from ir.causality import check_causal
from ir.errors import CompileError
from ir.initializers import initialize
from tests.codegen.test_lower import run, weight
from tests.codegen.test_select import selected


def fourier_mixing(b: Builder, x: Tensor) -> Tensor:
    """FNet: the real part of the transform over tokens and features."""
    real, imaginary = b.fft(x, x * 0.0, -1)
    return b.fft(real, imaginary, 1)[0]


def global_filter(b: Builder, x: Tensor) -> Tensor:
    """GFNet in one dimension: a product with a trained filter between transform and inverse."""
    real, imaginary = b.rfft(x, 1)
    first, second = (weight(b, name, *real.shape[1:]) for name in ("real", "imaginary"))
    return b.irfft(real * first - imaginary * second, real * second + imaginary * first, 1, x.shape[1])


def test_transforms_run_as_defined(tmp_path) -> None:
    """Both axes of a sequence of odd length, and filters over odd and even lengths."""
    b = Builder()
    x, even = b.input("x", (2, 15, 12)), b.input("even", (2, 10, 12))
    with b.scope("odd"):
        odd_filtered = global_filter(b, x)
    with b.scope("even"):
        even_filtered = global_filter(b, even)
    run(b.build(mixed=fourier_mixing(b, x), odd=odd_filtered, even=even_filtered), tmp_path)


def test_long_convolution_runs_as_defined(tmp_path) -> None:
    """A filter that is a function of parameters is packed; one that comes with the call is transformed with it."""
    b = Builder()
    x = b.input("x", (2, 13, 6))
    trained = b.long_conv(x, b.exp(weight(b, "h", 13, 6)))
    given = b.long_conv(x, b.input("h_given", (5, 6)))
    run(b.build(trained=trained, given=given), tmp_path)


def test_known_filters_are_packed() -> None:
    """Only a filter that depends on parameters alone is known when the model is compiled."""
    assert selected(lambda b, x: b.long_conv(x, weight(b, "h", 3, 8)))[0].endswith("constant)")
    assert selected(lambda b, x: b.long_conv(x, b.input("h", (3, 8)))) == ["long_conv(batch=2,t=3,channels=8,taps=3)"]


def test_long_convolution_is_causal_and_transforms_are_not() -> None:
    """An output of the convolution depends on the past only; a transform over tokens sees them all."""
    b = Builder()
    x = b.input("x", (1, 7, 4))
    graph = b.build(causal=b.long_conv(x, weight(b, "h", 7, 4)), mixed=fourier_mixing(b, x))
    params, rng = initialize(graph, 0), np.random.default_rng(0)
    assert check_causal(graph, "x", "causal", params, rng=rng) is None
    assert check_causal(graph, "x", "mixed", params, rng=rng) is not None


def test_axis_too_long_for_the_stack_is_refused() -> None:
    """The error names the node and the limit, instead of a crash at run time."""
    for make in (
        lambda b, x: b.rfft(x, 1),
        lambda b, x: b.long_conv(x, b.input("h", (400_000, 1))),
        lambda b, x: b.top_k(b.reshape(b.concat(1, x, x), 800_000), 5),
    ):
        b = Builder()
        made = make(b, b.input("x", (1, 400_000, 1)))
        with pytest.raises(CompileError, match="too long") as error:
            select(b.build(y=made if isinstance(made, Tensor) else made[0]))
        assert error.value.expected is not None
