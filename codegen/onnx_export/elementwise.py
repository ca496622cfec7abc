"""Rows of the elementwise operations."""

from __future__ import annotations

import math

from codegen.onnx_export.emitter import Emitter, Row, Site, Table
from ir.ops import elementwise as ew


def _plain(kind: str) -> Row:
    """A row for an operation that ONNX has."""
    return lambda e, site, *operands: e(kind, *operands)


def _rsqrt(e: Emitter, site: Site, x: str) -> str:
    return e("Reciprocal", e("Sqrt", x))


def _silu(e: Emitter, site: Site, x: str) -> str:
    return e("Mul", x, e("Sigmoid", x))


def _gelu(e: Emitter, site: Site, x: str) -> str:
    """x Phi(x); operator set 18 has no node for it."""
    error = e("Erf", e("Mul", x, e.floats(math.sqrt(0.5), site.dtype)))
    return e("Mul", e("Mul", x, e.floats(0.5, site.dtype)), e("Add", error, e.floats(1.0, site.dtype)))


def _compare(e: Emitter, site: Site, a: str, b: str) -> str:
    if site.types[0].dtype == "bool" and site.op.kind != "eq":
        a, b = e.cast(a, "int32"), e.cast(b, "int32")
    return e({"lt": "Less", "le": "LessOrEqual", "eq": "Equal"}[site.op.kind], a, b)


def _where(e: Emitter, site: Site, condition: str, a: str, b: str) -> str:
    if site.dtype != "bool":
        return e("Where", condition, a, b)
    return e("Or", e("And", condition, a), e("And", e("Not", condition), b))  # runtimes lack Where for bool


ROWS: Table = {
    ew.Neg: _plain("Neg"),
    ew.Exp: _plain("Exp"),
    ew.Log: _plain("Log"),
    ew.Sqrt: _plain("Sqrt"),
    ew.Rsqrt: _rsqrt,
    ew.Abs: _plain("Abs"),
    ew.Sin: _plain("Sin"),
    ew.Cos: _plain("Cos"),
    ew.Tanh: _plain("Tanh"),
    ew.Erf: _plain("Erf"),
    ew.Sigmoid: _plain("Sigmoid"),
    ew.Relu: _plain("Relu"),
    ew.Silu: _silu,
    ew.Gelu: _gelu,
    ew.Softplus: _plain("Softplus"),
    ew.Square: lambda e, site, x: e("Mul", x, x),
    ew.Add: _plain("Add"),
    ew.Sub: _plain("Sub"),
    ew.Mul: _plain("Mul"),
    ew.Div: _plain("Div"),
    ew.Maximum: _plain("Max"),
    ew.Minimum: _plain("Min"),
    ew.Pow: _plain("Pow"),
    ew.Compare: _compare,
    ew.Where: _where,
    ew.Cast: lambda e, site, x: e.cast(x, site.op.dtype),
}
