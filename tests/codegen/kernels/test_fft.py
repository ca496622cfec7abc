"""Fourier transforms and long convolutions over lengths of every kind, axes inside and last, and random shapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels._fft_writer import radices, smooth_length
from codegen.kernels.fft import FftKernel
from codegen.kernels.long_conv import LongConvKernel
from tests.codegen.kernels import checking
from tests.codegen.kernels.batches import check_all

KINDS = ("fft", "ifft", "rfft", "irfft")
SIZES = ((1, 1, 5), (2, 2, 1), (3, 8, 1), (1, 12, 37), (2, 15, 4), (17, 22, 1), (5, 45, 1), (1, 64, 16), (2, 128, 3))
FFTS = {f"{kind}-{outer}x{n}x{inner}": FftKernel(kind, outer, n, inner) for kind in KINDS for outer, n, inner in SIZES}
LONG = {
    "short_filter": LongConvKernel(2, 9, 5, 4),
    "one_step": LongConvKernel(1, 1, 3, 1),
    "odd_points": LongConvKernel(1, 25, 37, 25),
    "packed": LongConvKernel(2, 33, 37, 33, constant=True),
    "packed_short": LongConvKernel(1, 100, 8, 7, constant=True),
    "powers_of_two": LongConvKernel(2, 64, 16, 64),
}


def fft_inputs(kernel: FftKernel, seed: int = 0) -> list[np.ndarray]:
    """Random parts, and the roots of unity."""
    return [*checking.random_inputs(kernel, seed)[:-1], kernel.table()]


def long_inputs(kernel: LongConvKernel, seed: int = 0) -> list[np.ndarray]:
    """Random sequences and filters, and the roots of unity."""
    return [*checking.random_inputs(kernel, seed)[:2], kernel.table()]


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_fft_equals_reference(isa: str) -> None:
    """Powers of two, odd and prime lengths, lanes along columns and along rows."""
    check_all(FFTS, isa, inputs={name: fft_inputs(kernel) for name, kernel in FFTS.items()})


def test_every_knob_computes_the_same() -> None:
    """Every width and both radices give one result."""
    kernels = {name: FftKernel(name, 3, 24, inner) for name, inner in (("fft", 1), ("rfft", 9), ("irfft", 1))}
    check_all(kernels, "avx2", inputs={name: fft_inputs(kernel) for name, kernel in kernels.items()}, every_knob=True)
    for knobs in LONG["odd_points"].knob_space(checking.target_of("avx2").isa):
        checking.check(LONG["odd_points"], "avx2", inputs=long_inputs(LONG["odd_points"]), knobs=knobs)


@pytest.mark.parametrize("isa", checking.ISAS)
@pytest.mark.parametrize("case", LONG)
def test_long_conv_equals_reference(case: str, isa: str) -> None:
    """Filters shorter than the sequence or as long, known beforehand or not, points odd and even."""
    checking.check(LONG[case], isa, inputs=long_inputs(LONG[case]))


@given(kind=st.sampled_from(KINDS), sizes=st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 20)))
@settings(max_examples=8)
def test_fft_holds_for_random_shapes(kind: str, sizes: tuple[int, int, int]) -> None:
    """The float32 error stays within 1e-5 of the output's scale for any shape."""
    kernel = FftKernel(kind, *sizes)
    checking.check(kernel, "avx2", inputs=fft_inputs(kernel))


@given(batch=st.integers(1, 2), steps=st.integers(1, 90), channels=st.integers(1, 20), data=st.data())
@settings(max_examples=6)
def test_long_conv_holds_for_random_shapes(batch: int, steps: int, channels: int, data: st.DataObject) -> None:
    """The float32 error stays within 1e-5 of the output's scale for any shape."""
    kernel = LongConvKernel(batch, steps, channels, data.draw(st.integers(1, steps)), data.draw(st.booleans()))
    checking.check(kernel, "avx2", inputs=long_inputs(kernel))


def test_radices_multiply_to_the_length() -> None:
    """Any length is a product of its radices, of which no power of two is above the limit."""
    for length in range(1, 200):
        for largest in (4, 8):
            found = radices(length, largest)
            assert np.prod(found, dtype=int) == length
            assert all(radix <= largest or radix % 2 for radix in found)
    assert [smooth_length(least) for least in (1, 7, 11, 97)] == [1, 8, 12, 100]
