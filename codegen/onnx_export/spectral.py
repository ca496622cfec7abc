"""Rows of the Fourier transforms.

Lengths that are powers of two use `DFT`; others are products with the matrix of the transform, because runtimes compute
them by chirps in float32, whose error grows with the length (1e-3 at 4095, against 1e-6 for a power of two).
"""

from __future__ import annotations

import numpy as np

from codegen.onnx_export.emitter import Emitter, Site, Table
from ir.op import Array
from ir.ops import spectral as sp


def _is_power(length: int) -> bool:
    return length & (length - 1) == 0 and length > 1


def _joined(e: Emitter, real: str, imaginary: str) -> str:
    parts = [e("Unsqueeze", part, e.ints(-1)) for part in (real, imaginary)]
    return e("Concat", *parts, axis=-1)


def _parts(e: Emitter, joined: str) -> tuple[str, str]:
    """Real and imaginary part of `[..., 2]`."""
    real, imaginary = (e("Gather", joined, e.constant(np.asarray(index, np.int64)), axis=-1) for index in (0, 1))
    return real, imaginary


def _along(e: Emitter, x: str, matrix: Array, axis: int, rank: int, dtype: str) -> str:
    """Product of an axis with a matrix `[n, f]`."""
    order = [index for index in range(rank) if index != axis] + [axis]
    product = e("MatMul", e.transpose(x, *order), e.floats(matrix, dtype))
    return e.transpose(product, *(order.index(index) for index in range(rank)))


def _waves(length: int, frequencies: int) -> tuple[Array, Array]:
    """Cosines and sines `[n, f]` of 2 pi f t / n, the angle reduced before it is rounded."""
    turns = np.outer(np.arange(length), np.arange(frequencies)) % length / length
    return np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)


def _fft(e: Emitter, site: Site, real: str, imaginary: str) -> tuple[str, str]:
    op: sp.Fft = site.op
    rank, axis = site.types[0].rank, op.axis % site.types[0].rank
    length = site.types[0].shape[axis]
    if _is_power(length):
        joined = _joined(e, real, imaginary)
        return _parts(e, e("DFT", joined, axis=axis, inverse=int(op.inverse)))
    cosines, sines = _waves(length, length)
    if op.inverse:
        cosines, sines = cosines / length, -sines / length

    def times(x: str, matrix: Array) -> str:
        return _along(e, x, matrix, axis, rank, site.dtype)

    return (
        e("Add", times(real, cosines), times(imaginary, sines)),
        e("Sub", times(imaginary, cosines), times(real, sines)),
    )


def _rfft(e: Emitter, site: Site, x: str) -> tuple[str, str]:
    rank, axis = site.types[0].rank, site.op.axis % site.types[0].rank
    length = site.types[0].shape[axis]
    if _is_power(length):  # all frequencies: not every runtime returns the documented shape for one side
        whole = e("DFT", e("Unsqueeze", x, e.ints(-1)), axis=axis)
        return _parts(e, e("Slice", whole, e.ints(0), e.ints(length // 2 + 1), e.ints(axis)))
    cosines, sines = _waves(length, length // 2 + 1)
    real, imaginary = (_along(e, x, matrix, axis, rank, site.dtype) for matrix in (cosines, -sines))
    return real, imaginary


def _irfft(e: Emitter, site: Site, real: str, imaginary: str) -> str:
    """The frequencies above the middle are the mirrored conjugates of those below."""
    op: sp.Irfft = site.op
    rank, axis = site.types[0].rank, op.axis % site.types[0].rank
    length, half = op.length, op.length // 2 + 1
    if not _is_power(length):
        cosines, sines = (waves.T for waves in _waves(length, half))
        weight = np.full((half, 1), 2.0 / length)
        weight[0] = 1.0 / length
        if length % 2 == 0:
            weight[-1] = 1.0 / length
            sines[-1] = 0.0
        sines[0] = 0.0
        parts = [_along(e, x, weight * m, axis, rank, site.dtype) for x, m in ((real, cosines), (imaginary, -sines))]
        return e("Add", *parts)
    mirror = e.constant(np.arange(half - 2, 0, -1))
    inner = np.ones((half, *[1] * (rank - axis - 1)))
    inner[0] = inner[-1] = 0.0
    imaginary = e("Mul", imaginary, e.floats(inner, site.dtype))
    if half > 2:
        upper = [e("Gather", part, mirror, axis=axis) for part in (real, imaginary)]
        real = e("Concat", real, upper[0], axis=axis)
        imaginary = e("Concat", imaginary, e("Neg", upper[1]), axis=axis)
    return _parts(e, e("DFT", _joined(e, real, imaginary), axis=axis, inverse=1))[0]


def _long_conv(e: Emitter, site: Site, x: str, taps: str) -> str:
    """Transforms of a power of two that holds the whole result, so that nothing wraps around."""
    (_, steps, _), lags = site.types[0].shape, site.types[1].shape[0]
    length = 1 << (steps + lags - 2).bit_length() if steps + lags > 2 else 2
    first = e("DFT", e("Unsqueeze", x, e.ints(-1)), e.constant(np.asarray(length, np.int64)), axis=1)
    filter = e("Unsqueeze", taps, e.ints(0, -1))
    second = e("DFT", filter, e.constant(np.asarray(length, np.int64)), axis=1)
    (a, b), (c, d) = _parts(e, first), _parts(e, second)
    real = e("Sub", e("Mul", a, c), e("Mul", b, d))
    imaginary = e("Add", e("Mul", a, d), e("Mul", b, c))
    whole = _parts(e, e("DFT", _joined(e, real, imaginary), axis=1, inverse=1))[0]
    return e("Slice", whole, e.ints(0), e.ints(steps), e.ints(1))


ROWS: Table = {sp.Fft: _fft, sp.Rfft: _rfft, sp.Irfft: _irfft, sp.LongConv: _long_conv}
