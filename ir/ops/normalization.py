"""Softmax and norms over the last axis (softmax: any axis), and batch norm."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ir.op import Array, Op, Types, normal_axis, op, require
from ir.types import TensorType


@op
class Softmax(Op):
    """exp(x - max) / sum along an axis."""

    axis: int = -1

    def infer(self, x: TensorType) -> TensorType:
        require(x.is_float, "softmax needs floating-point input", found=x)
        normal_axis(self.axis, x.rank)
        return x

    def evaluate(self, x: Array) -> Array:
        weights = np.exp(x - np.max(x, axis=self.axis, keepdims=True))
        return weights / np.sum(weights, axis=self.axis, keepdims=True)

    def flops(self, operands: Types, results: Types) -> int:
        return 5 * results[0].size


class Norm(Op):
    """A norm over the last axis with optional per-element factors of size D.

    Class attributes:
        max_factors: How many factors it takes at most.
    """

    max_factors: ClassVar[int] = 1

    def infer(self, x: TensorType, *factors: TensorType) -> TensorType:
        require(x.is_float and x.rank >= 1, f"{self.name} needs floating-point input", found=x)
        require(len(factors) <= self.max_factors, f"{self.name} has too many operands", found=1 + len(factors))
        for factor in factors:
            fits = factor.shape == x.shape[-1:] and factor.is_float
            require(fits, "factor does not fit the last axis", expected=str(x.shape[-1:]), found=factor)
        return x


@op
class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

    Operands: x `[..., D]`, then scale `[D]`, then bias `[D]`, each optional in that order.
    Source: Ba, Kiros and Hinton 2016, "Layer Normalization".
    """

    max_factors = 2

    epsilon: float = 1e-5

    def evaluate(self, x: Array, *factors: Array) -> Array:
        centred = x - np.mean(x, axis=-1, keepdims=True)
        result = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        result = result * factors[0] if factors else result
        return result + factors[1] if len(factors) > 1 else result

    def flops(self, operands: Types, results: Types) -> int:
        return (6 + len(operands)) * results[0].size


@op
class BatchNorm(Op):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias for each channel of the last axis.

    Operands: x `[..., D]`, then scale, bias, mean and variance `[D]`. The meaning here is that at inference, by running
    statistics; a torch module in training takes mean and variance over all but the last axis of the batch instead and
    moves the running ones by `momentum`.
    Source: Ioffe and Szegedy 2015, "Batch Normalization".
    """

    epsilon: float = 1e-5
    momentum: float = 0.1

    def infer(self, x: TensorType, *factors: TensorType) -> TensorType:
        require(x.is_float and x.rank >= 2, "batch norm needs floating-point input", found=x)
        require(len(factors) == 4, "batch norm needs scale, bias, mean and variance", found=1 + len(factors))
        for factor in factors:
            fits = factor.shape == x.shape[-1:] and factor.is_float
            require(fits, "factor does not fit the last axis", expected=str(x.shape[-1:]), found=factor)
        return x

    def evaluate(self, x: Array, *factors: Array) -> Array:
        scale, bias, mean, variance = factors
        return (x - mean) / np.sqrt(variance + self.epsilon) * scale + bias

    def flops(self, operands: Types, results: Types) -> int:
        return 2 * results[0].size


@op
class RmsNorm(Norm):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis.

    Operands: x `[..., D]`, then optionally scale `[D]`.
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    epsilon: float = 1e-5

    def evaluate(self, x: Array, *factors: Array) -> Array:
        result = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return result * factors[0] if factors else result

    def flops(self, operands: Types, results: Types) -> int:
        return (3 + len(operands)) * results[0].size
