"""Elementwise operations with numpy broadcasting.

Cost convention: one floating-point operation an element for arithmetic and for each named function.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import numpy as np

from ir.op import Array, Op, Types, broadcast_shapes, op, require
from ir.types import TensorType

_erf: Final = np.frompyfunc(math.erf, 1, 1)


class Unary(Op):
    """A function of one floating-point tensor."""

    def infer(self, x: TensorType) -> TensorType:
        require(x.is_float, f"{self.name} needs floating-point input", found=x)
        return x

    def flops(self, operands: Types, results: Types) -> int:
        return results[0].size


class Binary(Op):
    """A function of two tensors of one dtype, broadcast together."""

    def infer(self, a: TensorType, b: TensorType) -> TensorType:
        same = a.dtype == b.dtype != "bool"
        require(same, f"{self.name} needs equal number dtypes", found=f"{a.dtype} and {b.dtype}")
        return TensorType(broadcast_shapes(a.shape, b.shape), a.dtype)

    def flops(self, operands: Types, results: Types) -> int:
        return results[0].size


class FloatBinary(Binary):
    """A function of two floating-point tensors of one dtype, broadcast together."""

    def infer(self, a: TensorType, b: TensorType) -> TensorType:
        require(a.is_float, f"{self.name} needs floating-point input", found=a)
        return super().infer(a, b)


@op
class Neg(Unary):
    """-x."""

    def evaluate(self, x: Array) -> Array:
        return -x


@op
class Exp(Unary):
    """exp(x)."""

    def evaluate(self, x: Array) -> Array:
        return np.exp(x)


@op
class Log(Unary):
    """Natural logarithm."""

    def evaluate(self, x: Array) -> Array:
        return np.log(x)


@op
class Sqrt(Unary):
    """Square root."""

    def evaluate(self, x: Array) -> Array:
        return np.sqrt(x)


@op
class Rsqrt(Unary):
    """1 / sqrt(x)."""

    def evaluate(self, x: Array) -> Array:
        return 1.0 / np.sqrt(x)


@op
class Abs(Unary):
    """|x|."""

    def evaluate(self, x: Array) -> Array:
        return np.abs(x)


@op
class Sin(Unary):
    """sin(x)."""

    def evaluate(self, x: Array) -> Array:
        return np.sin(x)


@op
class Cos(Unary):
    """cos(x)."""

    def evaluate(self, x: Array) -> Array:
        return np.cos(x)


@op
class Tanh(Unary):
    """tanh(x)."""

    def evaluate(self, x: Array) -> Array:
        return np.tanh(x)


@op
class Erf(Unary):
    """Gauss error function."""

    def evaluate(self, x: Array) -> Array:
        return np.asarray(_erf(x), dtype=x.dtype)


@op
class Sigmoid(Unary):
    """1 / (1 + exp(-x)), without overflow."""

    def evaluate(self, x: Array) -> Array:
        return np.exp(-np.logaddexp(0.0, -x)).astype(x.dtype)


@op
class Relu(Unary):
    """max(x, 0)."""

    def evaluate(self, x: Array) -> Array:
        return np.maximum(x, 0)


@op
class Silu(Unary):
    """X * sigmoid(x)."""

    def evaluate(self, x: Array) -> Array:
        return (x * np.exp(-np.logaddexp(0.0, -x))).astype(x.dtype)


@op
class Gelu(Unary):
    """X * Phi(x) with the exact normal distribution function (Hendrycks and Gimpel 2016)."""

    def evaluate(self, x: Array) -> Array:
        return 0.5 * x * (1.0 + np.asarray(_erf(x / math.sqrt(2.0)), dtype=x.dtype))


@op
class Softplus(Unary):
    """log(1 + exp(x)), without overflow."""

    def evaluate(self, x: Array) -> Array:
        return np.logaddexp(0.0, x).astype(x.dtype)


@op
class Square(Unary):
    """X * x."""

    def evaluate(self, x: Array) -> Array:
        return x * x


@op
class Add(Binary):
    """a + b."""

    commutative = True

    def evaluate(self, a: Array, b: Array) -> Array:
        return a + b


@op
class Sub(Binary):
    """a - b."""

    def evaluate(self, a: Array, b: Array) -> Array:
        return a - b


@op
class Mul(Binary):
    """a * b."""

    commutative = True

    def evaluate(self, a: Array, b: Array) -> Array:
        return a * b


@op
class Div(FloatBinary):
    """a / b."""

    def evaluate(self, a: Array, b: Array) -> Array:
        return a / b


@op
class Maximum(Binary):
    """Larger of two elements."""

    commutative = True

    def evaluate(self, a: Array, b: Array) -> Array:
        return np.maximum(a, b)


@op
class Minimum(Binary):
    """Smaller of two elements."""

    commutative = True

    def evaluate(self, a: Array, b: Array) -> Array:
        return np.minimum(a, b)


@op
class Pow(FloatBinary):
    """a ** b."""

    def evaluate(self, a: Array, b: Array) -> Array:
        return np.power(a, b)


@op
class Compare(Op):
    """Elementwise comparison; the result is bool.

    `kind` is one of lt, le, eq.
    """

    kind: Literal["lt", "le", "eq"]

    def infer(self, a: TensorType, b: TensorType) -> TensorType:
        require(self.kind in ("lt", "le", "eq"), "unknown comparison", expected="lt, le or eq", found=self.kind)
        require(a.dtype == b.dtype, "compare needs equal dtypes", found=f"{a.dtype} and {b.dtype}")
        return TensorType(broadcast_shapes(a.shape, b.shape), "bool")

    def evaluate(self, a: Array, b: Array) -> Array:
        return {"lt": np.less, "le": np.less_equal, "eq": np.equal}[self.kind](a, b)

    def flops(self, operands: Types, results: Types) -> int:
        return results[0].size


@op
class Where(Op):
    """Elements of `a` where the condition holds, else of `b`."""

    def infer(self, condition: TensorType, a: TensorType, b: TensorType) -> TensorType:
        require(condition.dtype == "bool", "where needs a bool condition", found=condition)
        require(a.dtype == b.dtype, "where needs equal dtypes", found=f"{a.dtype} and {b.dtype}")
        return TensorType(broadcast_shapes(condition.shape, a.shape, b.shape), a.dtype)

    def evaluate(self, condition: Array, a: Array, b: Array) -> Array:
        return np.where(condition, a, b)


@op
class Cast(Op):
    """Convert to another dtype; float to int truncates towards zero."""

    dtype: str

    def infer(self, x: TensorType) -> TensorType:
        return TensorType(x.shape, self.dtype)

    def evaluate(self, x: Array) -> Array:
        kind = {"int32": np.int32, "bool": np.bool_}.get(self.dtype)
        if kind is not None:
            return x.astype(kind)
        return x if x.dtype.kind == "f" else x.astype(np.float64)
