"""Rounding to bfloat16 in numpy, which has no such type: sign and exponent of a float32, and 7 bits of its fraction."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ir.op import Array

_DROPPED_BITS: Final = 16
_QUIET_NAN: Final = np.uint16(0x7FC0)


def bfloat16_bits(array: Array) -> Array:
    """Round to the nearest bfloat16, ties to even, and return its bits as uint16; what is not a number stays so."""
    numbers = np.asarray(array, np.float32)
    bits = _bits_as(np.uint32, numbers).astype(np.uint64)  # room for the carry
    tie_to_even = (bits >> _DROPPED_BITS) & 1
    rounded = ((bits + 0x7FFF + tie_to_even) >> _DROPPED_BITS).astype(np.uint16)
    return np.where(np.isnan(numbers), _QUIET_NAN, rounded)


def from_bfloat16_bits(bits: Array) -> Array:
    """Return the float32 numbers that bfloat16 bits stand for."""
    return _bits_as(np.float32, np.asarray(bits, np.uint32) << _DROPPED_BITS)


def round_to_bfloat16(array: Array) -> Array:
    """Round to the nearest bfloat16, ties to even; the result has the dtype of the argument."""
    return from_bfloat16_bits(bfloat16_bits(array)).astype(array.dtype)


def _bits_as(kind: type[Any], array: Array) -> Array:
    """The same memory under another type of equal size."""
    return np.ndarray(array.shape, kind, buffer=np.asarray(array, order="C"))
