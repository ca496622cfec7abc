"""Reductions over axes, and the running sum."""

from __future__ import annotations

import numpy as np

from ir.op import Array, Op, Types, normal_axis, op, require
from ir.types import TensorType


class Reduction(Op):
    """A reduction over `axes`; `keepdims` leaves them with size 1."""

    axes: tuple[int, ...]
    keepdims: bool = False

    def infer(self, x: TensorType) -> TensorType:
        require(x.is_float, f"{self.name} needs floating-point input", found=x)
        require(len(self.axes) > 0, f"{self.name} needs at least one axis")
        axes = {normal_axis(axis, x.rank) for axis in self.axes}
        require(len(axes) == len(self.axes), "an axis is reduced twice", found=self.axes)
        kept = [(axis, size) for axis, size in enumerate(x.shape) if self.keepdims or axis not in axes]
        return x.with_shape(tuple(1 if axis in axes else size for axis, size in kept))

    def flops(self, operands: Types, results: Types) -> int:
        return operands[0].size


@op
class Sum(Reduction):
    """Sum over axes."""

    axes: tuple[int, ...]
    keepdims: bool = False

    def evaluate(self, x: Array) -> Array:
        return np.sum(x, axis=self.axes, keepdims=self.keepdims)


@op
class Mean(Reduction):
    """Arithmetic mean over axes."""

    axes: tuple[int, ...]
    keepdims: bool = False

    def evaluate(self, x: Array) -> Array:
        return np.mean(x, axis=self.axes, keepdims=self.keepdims)


@op
class Max(Reduction):
    """Largest element over axes."""

    axes: tuple[int, ...]
    keepdims: bool = False

    def evaluate(self, x: Array) -> Array:
        return np.max(x, axis=self.axes, keepdims=self.keepdims)


@op
class Cumsum(Op):
    """Inclusive running sum along an axis."""

    axis: int

    def infer(self, x: TensorType) -> TensorType:
        require(x.is_float, "cumsum needs floating-point input", found=x)
        normal_axis(self.axis, x.rank)
        return x

    def evaluate(self, x: Array) -> Array:
        return np.cumsum(x, axis=self.axis)

    def flops(self, operands: Types, results: Types) -> int:
        return results[0].size
