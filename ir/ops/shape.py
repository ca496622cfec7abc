"""Operations that only rearrange: no arithmetic."""

from __future__ import annotations

import math

import numpy as np

from ir.op import Array, Op, Types, broadcast_shapes, normal_axis, op, require
from ir.types import TensorType


@op
class Reshape(Op):
    """Same elements in row-major order, another shape; one size may be -1."""

    shape: tuple[int, ...]

    def infer(self, x: TensorType) -> TensorType:
        require(self.shape.count(-1) <= 1, "at most one size may be -1", found=self.shape)
        known = math.prod(size for size in self.shape if size != -1)
        shape = tuple(x.size // max(known, 1) if size == -1 else size for size in self.shape)
        require(math.prod(shape) == x.size, "reshape changes the number of elements", expected=str(x), found=self.shape)
        return x.with_shape(shape)

    def evaluate(self, x: Array) -> Array:
        return np.reshape(x, self.shape)

    def bytes_moved(self, operands: Types, results: Types) -> int:
        return 0  # a view


@op
class Transpose(Op):
    """Axes in another order."""

    permutation: tuple[int, ...]

    def infer(self, x: TensorType) -> TensorType:
        require(
            sorted(self.permutation) == list(range(x.rank)),
            "not a permutation of the axes",
            expected=f"an order of 0..{x.rank - 1}",
            found=self.permutation,
        )
        return x.with_shape(tuple(x.shape[axis] for axis in self.permutation))

    def evaluate(self, x: Array) -> Array:
        return np.transpose(x, self.permutation)


@op
class Slice(Op):
    """Elements start, start + stride, ... below stop along one axis."""

    axis: int
    start: int
    stop: int
    stride: int = 1

    def infer(self, x: TensorType) -> TensorType:
        axis = normal_axis(self.axis, x.rank)
        require(
            0 <= self.start < self.stop <= x.shape[axis] and self.stride > 0,
            "slice out of range",
            expected=f"0 <= start < stop <= {x.shape[axis]}, stride > 0",
            found=f"{self.start}:{self.stop}:{self.stride}",
        )
        size = -(-(self.stop - self.start) // self.stride)
        return x.with_shape((*x.shape[:axis], size, *x.shape[axis + 1 :]))

    def evaluate(self, x: Array) -> Array:
        index: list[slice] = [slice(None)] * x.ndim
        index[self.axis] = slice(self.start, self.stop, self.stride)
        return x[tuple(index)]


@op
class Concat(Op):
    """Tensors one after the other along an axis."""

    axis: int

    def infer(self, *parts: TensorType) -> TensorType:
        require(len(parts) > 0, "concat needs operands")
        axis = normal_axis(self.axis, parts[0].rank)
        rest = {(t.dtype, t.shape[:axis], t.shape[axis + 1 :]) for t in parts}
        require(len(rest) == 1, "concat operands differ beside the axis", found=", ".join(map(str, parts)))
        size = sum(t.shape[axis] for t in parts)
        return parts[0].with_shape((*parts[0].shape[:axis], size, *parts[0].shape[axis + 1 :]))

    def evaluate(self, *parts: Array) -> Array:
        return np.concatenate(parts, axis=self.axis)


@op
class Pad(Op):
    """Constant padding: `low[i]` elements before and `high[i]` after along axis i."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    value: float = 0.0

    def infer(self, x: TensorType) -> TensorType:
        require(len(self.low) == len(self.high) == x.rank, "padding needs one pair an axis", found=x)
        require(min((*self.low, *self.high), default=0) >= 0, "padding is negative", found=f"{self.low}, {self.high}")
        return x.with_shape(tuple(a + size + b for a, size, b in zip(self.low, x.shape, self.high, strict=True)))

    def evaluate(self, x: Array) -> Array:
        sizes = [a + size + b for a, size, b in zip(self.low, x.shape, self.high, strict=True)]
        padded = np.full(sizes, self.value, x.dtype)
        padded[tuple(slice(low, low + size) for low, size in zip(self.low, x.shape, strict=True))] = x
        return padded


@op
class Broadcast(Op):
    """Repeat along axes of size 1 and new leading axes, as in numpy."""

    shape: tuple[int, ...]

    def infer(self, x: TensorType) -> TensorType:
        fits = broadcast_shapes(x.shape, self.shape) == self.shape
        require(fits, "does not broadcast", found=f"{x} to {self.shape}")
        return x.with_shape(self.shape)

    def evaluate(self, x: Array) -> Array:
        return np.broadcast_to(x, self.shape)
