"""Write a graph as ordinary expressions.

b = Builder()
x = b.input("x", (batch, time, d_model))
with b.scope("mlp"):
    up = b.parameter("up", ((Axis("d_model", d_model),), (Axis("hidden", hidden),)))
    y = b.silu(b.matmul(x, up))
graph = b.build(y=y)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ir._builder_groups import Mixing, Routing, Spectra
from ir.errors import GraphError
from ir.graph import Graph, Node, Value
from ir.op import Array, Op
from ir.ops.contraction import Matmul
from ir.ops.control import Body, Loop
from ir.ops.elementwise import (
    Add,
    Cast,
    Compare,
    Div,
    Exp,
    Gelu,
    Log,
    Maximum,
    Minimum,
    Mul,
    Neg,
    Relu,
    Rsqrt,
    Sigmoid,
    Silu,
    Softplus,
    Sqrt,
    Square,
    Sub,
    Tanh,
    Where,
)
from ir.ops.normalization import BatchNorm, LayerNorm, RmsNorm, Softmax
from ir.ops.reduction import Cumsum, Max, Mean, Sum
from ir.ops.shape import Broadcast, Concat, Pad, Reshape, Slice, Transpose
from ir.ops.structure import Component, ComponentOptions, Constant, Input, Parameter
from ir.rewrite import keep_live
from ir.types import Axes, Axis, TensorType


@dataclass(frozen=True, eq=False)
class Tensor:
    """A value being built; arithmetic operators add nodes. Numbers become constants."""

    builder: Builder
    value: Value
    type: TensorType

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return self.type.shape

    def __add__(self, other: Tensor | float) -> Tensor:
        return self.builder.apply(Add(), self, self.builder.lift(other))

    __radd__ = __add__

    def __sub__(self, other: Tensor | float) -> Tensor:
        return self.builder.apply(Sub(), self, self.builder.lift(other))

    def __rsub__(self, other: float) -> Tensor:
        return self.builder.apply(Sub(), self.builder.lift(other), self)

    def __mul__(self, other: Tensor | float) -> Tensor:
        return self.builder.apply(Mul(), self, self.builder.lift(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Tensor | float) -> Tensor:
        return self.builder.apply(Div(), self, self.builder.lift(other))

    def __neg__(self) -> Tensor:
        return self.builder.apply(Neg(), self)


class Builder(Mixing, Routing, Spectra):
    """Collects nodes in order; every method adds at most a few."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._scopes: list[str] = []
        self._parameters: dict[str, Tensor] = {}
        self._reusing = False
        self._outer: Builder | None = None
        self._captured: list[Tensor] = []

    # -- structure ---------------------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, name: str) -> Generator[None, None, None]:
        """Put the nodes and parameters made inside under a name."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    @contextmanager
    def reuse(self) -> Generator[None, None, None]:
        """Read again, instead of making, the parameters whose names are taken: the same layers a second time."""
        before, self._reusing = self._reusing, True
        try:
            yield
        finally:
            self._reusing = before

    @property
    def scope_path(self) -> str:
        """The current scope, such as `layers.3.mixer`."""
        return ".".join(part for part in self._scopes if part)

    def apply(self, op: Op, *operands: Tensor) -> Tensor:
        """Add a node with one result.

        Raises:
            GraphError: The operands do not fit the operation, or it has several results.
        """
        results = self.apply_all(op, *operands)
        if len(results) != 1:
            raise GraphError("the operation has several results; use apply_all", where=op.name)
        return results[0]

    def apply_all(self, op: Op, *operands: Tensor) -> tuple[Tensor, ...]:
        """Add a node and return all its results.

        Raises:
            GraphError: The operands do not fit the operation or belong to another builder.
        """
        if any(operand.builder is not self for operand in operands):
            raise GraphError("an operand belongs to another builder", where=f"{self.scope_path}/{op.name}")
        try:
            types = op.infer_types(tuple(operand.type for operand in operands))
        except GraphError as error:
            where = f"{self.scope_path}/{op.name}"
            raise GraphError(error.message, where=where, expected=error.expected, found=error.found) from error
        node = Node(len(self._nodes), op, tuple(operand.value for operand in operands), types, self.scope_path)
        self._nodes.append(node)
        return tuple(Tensor(self, value, kind) for value, kind in zip(node.results, types, strict=True))

    def input(self, name: str, shape: Sequence[int], dtype: str = "float32") -> Tensor:
        """A value given at call time."""
        return self.apply(Input(name, TensorType(tuple(shape), dtype)))

    def parameter(self, name: str, axes: Axes, init: str = "fan_in", *, trained: bool = True) -> Tensor:
        """A tensor of the model named by the current scope and `name`; its shape is the product of each tuple of axes.

        Raises:
            GraphError: The name is taken and nothing is reused, or what is reused differs.
        """
        label = f"{self.scope_path}.{name}" if self.scope_path else name
        return self._declare(Parameter(label, axes, init, trained), self._scopes)

    def _declare(self, made: Parameter, scopes: list[str]) -> Tensor:
        """A parameter, new or reused; in the body of a loop it is an input, and a parameter of the model outside."""
        label = made.label
        if self._outer is not None:
            outside = self._outer._declare(made, scopes)
            if label not in self._parameters:
                self._captured.append(outside)
                self._parameters[label] = self.apply(Input(label, outside.type))
        elif label not in self._parameters:
            before, self._scopes = self._scopes, scopes
            self._parameters[label] = self.apply(made)
            self._scopes = before
        elif not self._reusing:
            raise GraphError("parameter is defined twice", where=label, hint="use `shared` to read it again")
        elif (found := self._nodes[self._parameters[label].value.node].op) != made:
            raise GraphError("a parameter is reused as another one", where=label, expected=str(found), found=str(made))
        return self._parameters[label]

    def shared(self, label: str) -> Tensor:
        """A parameter made before, by its full name.

        Raises:
            GraphError: No such parameter yet.
        """
        if label not in self._parameters:
            raise GraphError("no such parameter to share", where=label)
        return self._parameters[label]

    def loop(
        self,
        times: int,
        body: Callable[[Builder, tuple[Tensor, ...], tuple[Tensor, ...]], Sequence[Tensor]],
        carried: Sequence[Tensor],
        given: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """Run a body several times on its own results.

        Args:
            times: How often.
            body: Gets a builder, what is carried and what is given, and returns what is carried on, of equal types.
                Parameters that it makes belong to the model as usual; other values of this builder must be given.
            carried: What the first turn starts from.
            given: What every turn reads as it is.

        Returns:
            What is carried after the last turn.

        Raises:
            GraphError: A turn changes the types, or a parameter is defined twice.
        """
        inner = Builder()
        inner._scopes, inner._outer = list(self._scopes), self
        read = [inner.input(f"x{index}", x.shape, x.type.dtype) for index, x in enumerate((*carried, *given))]
        results = body(inner, tuple(read[: len(carried)]), tuple(read[len(carried) :]))
        graph = keep_live(inner.build(**{f"y{index}": tensor for index, tensor in enumerate(results)}))
        return self.apply_all(Loop(times, Body(graph)), *carried, *given, *inner._captured)

    def constant(self, array: Array | float) -> Tensor:
        """A tensor of known values; float64 becomes float32, int64 becomes int32."""
        return self.apply(Constant.from_array(np.asarray(array)))

    def lift(self, value: Tensor | float) -> Tensor:
        """A tensor as it is, a number as a float32 scalar constant."""
        return value if isinstance(value, Tensor) else self.constant(float(value))

    def component(
        self,
        kind: str,
        key: str,
        options: ComponentOptions,
        *operands: Tensor,
        types: tuple[TensorType, ...] | None = None,
    ) -> Tensor:
        """A component as one node; without `types` the result has the type of the first operand."""
        return self.apply(Component(kind, key, options, types or (operands[0].type,)), *operands)

    def build(self, **outputs: Tensor) -> Graph:
        """Freeze what was built into a graph with named outputs."""
        return Graph(self._nodes, [(name, tensor.value) for name, tensor in outputs.items()])

    # -- arithmetic --------------------------------------------------------------------------------------------------

    def matmul(self, a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
        """Batched matrix product over the last two axes."""
        return self.apply(Matmul(transpose_a, transpose_b), a, b)

    def linear(
        self, x: Tensor, name: str, outputs: Sequence[Axis], *, bias: bool = False, init: str = "fan_in"
    ) -> Tensor:
        """x `[..., D]` times a new weight `[D, product of outputs]`, plus a bias `name_bias` if asked.

        The input dimension is the axis `d_model`; use `parameter` and `matmul` where it is factored otherwise.
        """
        weight = self.parameter(name, ((Axis("d_model", x.shape[-1]),), tuple(outputs)), init)
        y = self.matmul(x, weight)
        return y + self.parameter(f"{name}_bias", (tuple(outputs),), "constant(0)") if bias else y

    def exp(self, x: Tensor) -> Tensor:
        """Exponential, elementwise."""
        return self.apply(Exp(), x)

    def log(self, x: Tensor) -> Tensor:
        """Natural logarithm, elementwise."""
        return self.apply(Log(), x)

    def sqrt(self, x: Tensor) -> Tensor:
        """Square root, elementwise."""
        return self.apply(Sqrt(), x)

    def rsqrt(self, x: Tensor) -> Tensor:
        """Reciprocal square root, elementwise."""
        return self.apply(Rsqrt(), x)

    def tanh(self, x: Tensor) -> Tensor:
        """Hyperbolic tangent, elementwise."""
        return self.apply(Tanh(), x)

    def sigmoid(self, x: Tensor) -> Tensor:
        """Logistic function, elementwise."""
        return self.apply(Sigmoid(), x)

    def relu(self, x: Tensor) -> Tensor:
        """max(x, 0), elementwise."""
        return self.apply(Relu(), x)

    def silu(self, x: Tensor) -> Tensor:
        """x * sigmoid(x), elementwise."""
        return self.apply(Silu(), x)

    def gelu(self, x: Tensor) -> Tensor:
        """x times the normal distribution function of x, elementwise."""
        return self.apply(Gelu(), x)

    def softplus(self, x: Tensor) -> Tensor:
        """log(1 + exp(x)), elementwise."""
        return self.apply(Softplus(), x)

    def square(self, x: Tensor) -> Tensor:
        """x * x, elementwise."""
        return self.apply(Square(), x)

    def maximum(self, a: Tensor, b: Tensor | float) -> Tensor:
        """Larger of two elements."""
        return self.apply(Maximum(), a, self.lift(b))

    def minimum(self, a: Tensor, b: Tensor | float) -> Tensor:
        """Smaller of two elements."""
        return self.apply(Minimum(), a, self.lift(b))

    def less(self, a: Tensor, b: Tensor) -> Tensor:
        """a < b, elementwise, as bool."""
        return self.apply(Compare("lt"), a, b)

    def less_equal(self, a: Tensor, b: Tensor) -> Tensor:
        """a <= b, elementwise, as bool."""
        return self.apply(Compare("le"), a, b)

    def equal(self, a: Tensor, b: Tensor) -> Tensor:
        """a == b, elementwise, as bool."""
        return self.apply(Compare("eq"), a, b)

    def where(self, condition: Tensor, a: Tensor, b: Tensor | float) -> Tensor:
        """Elements of a where the condition holds, else of b."""
        return self.apply(Where(), condition, a, self.lift(b))

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """Another element type."""
        return self.apply(Cast(dtype), x)

    # -- reductions and norms ----------------------------------------------------------------------------------------

    def sum(self, x: Tensor, *axes: int, keepdims: bool = False) -> Tensor:
        """Sum over axes."""
        return self.apply(Sum(axes, keepdims), x)

    def mean(self, x: Tensor, *axes: int, keepdims: bool = False) -> Tensor:
        """Mean over axes."""
        return self.apply(Mean(axes, keepdims), x)

    def max(self, x: Tensor, *axes: int, keepdims: bool = False) -> Tensor:
        """Maximum over axes."""
        return self.apply(Max(axes, keepdims), x)

    def cumsum(self, x: Tensor, axis: int) -> Tensor:
        """Running sum along an axis."""
        return self.apply(Cumsum(axis), x)

    def softmax(self, x: Tensor, axis: int = -1) -> Tensor:
        """Softmax along an axis."""
        return self.apply(Softmax(axis), x)

    def layer_norm(self, x: Tensor, *factors: Tensor, epsilon: float = 1e-5) -> Tensor:
        """Layer norm over the last axis with optional scale and bias."""
        return self.apply(LayerNorm(epsilon), x, *factors)

    def rms_norm(self, x: Tensor, *factors: Tensor, epsilon: float = 1e-5) -> Tensor:
        """Root-mean-square norm over the last axis with optional scale."""
        return self.apply(RmsNorm(epsilon), x, *factors)

    def batch_norm(self, x: Tensor, name: str, *, epsilon: float = 1e-5, scale: float = 1.0) -> Tensor:
        """Batch norm over the last axis, with parameters `name_scale`, `name_bias`, `name_mean` and `name_variance`."""
        axes = ((Axis("channels", x.shape[-1]),),)
        factors = (
            self.parameter(f"{name}_scale", axes, f"constant({scale:g})"),
            self.parameter(f"{name}_bias", axes, "constant(0)"),
            self.parameter(f"{name}_mean", axes, "constant(0)", trained=False),
            self.parameter(f"{name}_variance", axes, "constant(1)", trained=False),
        )
        return self.apply(BatchNorm(epsilon), x, *factors)

    # -- shape and indexing ------------------------------------------------------------------------------------------

    def reshape(self, x: Tensor, *shape: int) -> Tensor:
        """Same elements, another shape; one size may be -1."""
        return self.apply(Reshape(shape), x)

    def split_heads(self, x: Tensor, heads: int) -> Tensor:
        """`[B, T, H * K]` to `[B, T, H, K]`."""
        return self.reshape(x, *x.shape[:-1], heads, x.shape[-1] // heads)

    def merge_heads(self, x: Tensor) -> Tensor:
        """`[B, T, H, K]` to `[B, T, H * K]`."""
        return self.reshape(x, *x.shape[:-2], x.shape[-2] * x.shape[-1])

    def transpose(self, x: Tensor, *permutation: int) -> Tensor:
        """Axes in another order."""
        return self.apply(Transpose(permutation), x)

    def slice(self, x: Tensor, axis: int, start: int, stop: int, stride: int = 1) -> Tensor:
        """Elements start to stop along an axis."""
        return self.apply(Slice(axis % x.type.rank, start, stop, stride), x)

    def split(self, x: Tensor, axis: int, *sizes: int) -> tuple[Tensor, ...]:
        """Consecutive pieces of the given sizes along an axis."""
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        return tuple(self.slice(x, axis, end - size, end) for size, end in zip(sizes, ends, strict=True))

    def concat(self, axis: int, *parts: Tensor) -> Tensor:
        """Tensors one after the other."""
        return self.apply(Concat(axis), *parts)

    def pad(self, x: Tensor, axis: int, low: int, high: int, value: float = 0.0) -> Tensor:
        """Constant padding along one axis."""
        sides = [0] * x.type.rank
        lows, highs = sides.copy(), sides.copy()
        lows[axis], highs[axis] = low, high
        return self.apply(Pad(tuple(lows), tuple(highs), value), x)

    def broadcast(self, x: Tensor, *shape: int) -> Tensor:
        """Repeat along axes of size one and new leading axes."""
        return self.apply(Broadcast(shape), x)
