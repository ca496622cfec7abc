"""Types of the values in a graph, and the factored axes of parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from ir.errors import GraphError

DTYPE_BYTES: Final[dict[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "bool": 1}
FLOAT_DTYPES: Final[frozenset[str]] = frozenset({"float32", "float16", "bfloat16"})


@dataclass(frozen=True)
class TensorType:
    """Shape and element type of a value; every dimension is a positive integer."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise GraphError("unknown dtype", expected=", ".join(DTYPE_BYTES), found=repr(self.dtype))
        if not all(type(size) is int and size > 0 for size in self.shape):
            raise GraphError("a dimension is not a positive integer", found=str(self.shape))

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.size * DTYPE_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.dtype in FLOAT_DTYPES

    def with_shape(self, shape: tuple[int, ...]) -> TensorType:
        """Same dtype, another shape."""
        return TensorType(shape, self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Axis:
    """One named factor of a parameter's dimension, such as `heads` of size 4.

    A dimension of a parameter is a product of axes; a supernet slices each axis by itself.
    """

    name: str
    size: int

    def __post_init__(self) -> None:
        if not (type(self.size) is int and self.size > 0):
            raise GraphError("an axis size is not a positive integer", where=self.name, found=str(self.size))

    def __str__(self) -> str:
        return f"{self.name}={self.size}"


Axes = tuple[tuple[Axis, ...], ...]
"""Axes of a parameter: one tuple of factors per dimension, slowest factor first."""


def axes_shape(axes: Axes) -> tuple[int, ...]:
    """Shape of a parameter from its factored axes."""
    return tuple(math.prod(axis.size for axis in factors) for factors in axes)
