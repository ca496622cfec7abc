"""Discrete Fourier transforms, and convolution with filters as long as the sequence.

A complex tensor is two real ones, real and imaginary part. n is the length of the axis, f a frequency:
X_f = sum_t x_t exp(-2 pi i f t / n); inverses divide by n.
"""

from __future__ import annotations

import numpy as np

from ir.op import Array, Op, Types, normal_axis, op, require
from ir.types import TensorType


def _fft_flops(length: int, transforms: int) -> int:
    """5 n log2 n for each transform of n complex numbers, the usual count."""
    return 5 * transforms * length * max((length - 1).bit_length(), 1)


def _resized(x: TensorType, axis: int, size: int) -> TensorType:
    return x.with_shape((*x.shape[:axis], size, *x.shape[axis + 1 :]))


@op
class Fft(Op):
    """Complex transform along an axis, or its inverse. Operands and results: real and imaginary part."""

    axis: int
    inverse: bool = False

    def infer(self, real: TensorType, imaginary: TensorType) -> Types:
        require(real.is_float and real == imaginary, "fft needs two equal parts", found=f"{real} and {imaginary}")
        normal_axis(self.axis, real.rank)
        return real, imaginary

    def evaluate(self, real: Array, imaginary: Array) -> tuple[Array, Array]:
        transform = np.fft.ifft if self.inverse else np.fft.fft
        result = transform(real + 1j * imaginary, axis=self.axis)
        return result.real.astype(real.dtype), result.imag.astype(real.dtype)

    def flops(self, operands: Types, results: Types) -> int:
        length = operands[0].shape[self.axis]
        return _fft_flops(length, operands[0].size // length)


@op
class Rfft(Op):
    """Transform of real numbers along an axis; results: real and imaginary part at the frequencies 0 to n // 2."""

    axis: int

    def infer(self, x: TensorType) -> Types:
        require(x.is_float, "rfft needs floating-point input", found=x)
        axis = normal_axis(self.axis, x.rank)
        half = _resized(x, axis, x.shape[axis] // 2 + 1)
        return half, half

    def evaluate(self, x: Array) -> tuple[Array, Array]:
        result = np.fft.rfft(x, axis=self.axis)
        return result.real.astype(x.dtype), result.imag.astype(x.dtype)

    def flops(self, operands: Types, results: Types) -> int:
        length = operands[0].shape[self.axis]
        return _fft_flops(length, operands[0].size // length) // 2


@op
class Irfft(Op):
    """Inverse of `rfft`: real numbers of a given length from the real and imaginary part at frequencies 0 to n // 2.

    The imaginary parts at frequency 0 and, if n is even, at n // 2 count as zero.
    """

    axis: int
    length: int

    def infer(self, real: TensorType, imaginary: TensorType) -> TensorType:
        require(real.is_float and real == imaginary, "irfft needs two equal parts", found=f"{real} and {imaginary}")
        axis = normal_axis(self.axis, real.rank)
        require(
            self.length > 0 and self.length // 2 + 1 == real.shape[axis],
            "irfft length does not fit the frequencies",
            expected=f"{max(2 * real.shape[axis] - 2, 1)} or {2 * real.shape[axis] - 1}",
            found=self.length,
        )
        return _resized(real, axis, self.length)

    def evaluate(self, real: Array, imaginary: Array) -> Array:
        return np.fft.irfft(real + 1j * imaginary, n=self.length, axis=self.axis).astype(real.dtype)

    def flops(self, operands: Types, results: Types) -> int:
        return _fft_flops(self.length, results[0].size // self.length) // 2


@op
class LongConv(Op):
    """Causal convolution of each channel with its own filter, by fast transforms: y_t = sum_{s <= t} h_s x_{t-s}.

    Operands: x `[B, T, C]`, filter h `[L, C]` with L <= T. Source: Poli et al. 2023, "Hyena Hierarchy".
    """

    def infer(self, x: TensorType, filter: TensorType) -> TensorType:
        fits = x.rank == 3 and filter.rank == 2 and x.shape[2] == filter.shape[1] and filter.shape[0] <= x.shape[1]
        require(fits, "long_conv needs [B, T, C] and [L, C], L <= T", found=f"{x} and {filter}")
        require(x.is_float and x.dtype == filter.dtype, "long_conv needs equal float dtypes", found=f"{x}, {filter}")
        return x

    def evaluate(self, x: Array, filter: Array) -> Array:
        result = np.zeros_like(x)
        for lag, factor in enumerate(filter):
            result[:, lag:] += factor * x[:, : x.shape[1] - lag]
        return result

    def flops(self, operands: Types, results: Types) -> int:
        (batch, steps, channels), padded = operands[0].shape, 2 * operands[0].shape[1]
        return _fft_flops(padded, channels * (2 * batch + 1)) // 2 + 8 * batch * channels * steps

    def macs(self, operands: Types, results: Types) -> int:
        return self.flops(operands, results) // 2
