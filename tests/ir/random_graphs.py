"""Random well-typed graphs over every operation, for property tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ir.builder import Builder, Tensor
from ir.causality import draw_input
from ir.graph import Graph, Node, Value
from ir.interpret import evaluate
from ir.op import Op
from ir.ops.attention import Attention, Rope
from ir.ops.contraction import Matmul
from ir.ops.control import Loop
from ir.ops.convolution import Conv, Pool
from ir.ops.elementwise import (
    Abs,
    Add,
    Cast,
    Compare,
    Cos,
    Div,
    Erf,
    Exp,
    Gelu,
    Log,
    Maximum,
    Minimum,
    Mul,
    Neg,
    Pow,
    Relu,
    Rsqrt,
    Sigmoid,
    Silu,
    Sin,
    Softplus,
    Sqrt,
    Square,
    Sub,
    Tanh,
    Where,
)
from ir.ops.indexing import DynamicUpdate, Gather, ScatterAdd, Take
from ir.ops.normalization import BatchNorm, LayerNorm, RmsNorm, Softmax
from ir.ops.recurrence import DECAYS, LinearScan, OuterScan
from ir.ops.reduction import Cumsum, Max, Mean, Sum
from ir.ops.shape import Broadcast, Concat, Pad, Reshape, Slice, Transpose
from ir.ops.sorting import TopK
from ir.ops.spectral import Fft, Irfft, LongConv, Rfft
from ir.ops.structure import Constant
from ir.types import Axis

MAX_ELEMENTS = 400
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -3.25)


@dataclass
class Pool_:
    """Values made so far, and the choices of one example."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    b: Builder
    floats: list[Tensor] = field(default_factory=list)
    made: int = 0

    def one_of(self, choices: Sequence[Any]) -> Any:
        """One of several things."""
        return self.draw(st.sampled_from(list(choices)))

    def integer(self, low: int, high: int) -> int:
        """A number from low to high."""
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        """Yes or no."""
        return self.draw(st.booleans())

    def any(self, least_rank: int = 0) -> Tensor:
        """A float value of at least some rank."""
        fitting = [value for value in self.floats if value.type.rank >= least_rank]
        return self.one_of(fitting) if fitting else self.fresh((2, 3, 4)[: max(least_rank, 1)])

    def fresh(self, shape: Sequence[int]) -> Tensor:
        """A new parameter or input of a shape."""
        self.made += 1
        if self.flag():
            return self.b.input(f"in{self.made}", shape)
        axes = tuple((Axis("a", 2), Axis("b", size // 2)) if size % 2 == 0 else (Axis("c", size),) for size in shape)
        return self.b.parameter(f"p{self.made}", axes, self.one_of(("fan_in", "normal(0.5)")))

    def like(self, *shape: int) -> Tensor:
        """A value of exactly this shape, an old one if there is one."""
        fitting = [value for value in self.floats if value.shape == shape]
        return self.one_of(fitting) if fitting and self.flag() else self.fresh(shape)

    def positive(self, x: Tensor) -> Tensor:
        """The value squeezed to 0.25 .. 1.25."""
        return self.b.sigmoid(x) + 0.25

    def beside(self, x: Tensor) -> Tensor:
        """Something that broadcasts with x to the shape of x."""
        match self.integer(0, 4):
            case 0:
                return self.b.constant(self.one_of(NUMBERS))
            case 1:
                return x
            case 2:
                return self.like(*x.shape[x.type.rank // 2 :])
            case 3:
                return self.b.broadcast(self.b.constant(self.one_of(NUMBERS)), *x.shape)
            case _:
                return self.like(*x.shape)

    def axis(self, x: Tensor) -> int:
        """An axis of x, counted from either end."""
        return self.integer(-x.type.rank, x.type.rank - 1)


Recipe = Callable[[Pool_], Tensor | tuple[Tensor, ...]]


def _unary(op: Op, *, positive: bool = False, bounded: bool = False) -> Recipe:
    def make(p: Pool_) -> Tensor:
        x = p.any()
        x = p.positive(x) if positive else p.b.tanh(x) if bounded else x
        return p.b.apply(op, x)

    return make


def _binary(op: Op) -> Recipe:
    def make(p: Pool_) -> Tensor:
        x = p.any()
        pair = (x, p.beside(x))
        return p.b.apply(op, *(reversed(pair) if p.flag() else pair))

    return make


def _compare(p: Pool_) -> Tensor:
    x = p.any()
    return p.b.cast(p.b.apply(Compare(p.one_of(("lt", "le", "eq"))), x, p.beside(x)), "float32")


def _where(p: Pool_) -> Tensor:
    x = p.any()
    return p.b.where(p.b.less(x, p.beside(x)), x, p.beside(x))


def _cast(p: Pool_) -> Tensor:
    x = p.any()
    middle = p.one_of(("float32", "float16", "bfloat16", "int32", "bool"))
    return p.b.cast(p.b.cast(p.b.tanh(x) * 3.0 if middle == "int32" else x, middle), "float32")


def _take(p: Pool_) -> Tensor:
    indices = p.b.constant(np.array([p.integer(0, 2) for _ in range(p.integer(1, 3))], np.int32))
    return p.b.take(p.like(3, *p.any().shape[:2]), indices)


def _dynamic_update(p: Pool_) -> Tensor:
    x = p.any(1)
    axis = p.axis(x)
    size = p.integer(1, x.shape[axis])
    shape = list(x.shape)
    shape[axis] = size
    position = p.b.constant(np.array(p.integer(0, x.shape[axis] - size), np.int32))
    return p.b.dynamic_update(x, p.like(*shape), position, axis)


def _indices(p: Pool_, shape: Sequence[int], axis: int, bound: int) -> Tensor:
    """Constant indices below a bound that fit a shape, sometimes one for all positions beside the axis."""
    shared = p.flag()
    sizes = [1 if shared and other != axis % len(shape) else size for other, size in enumerate(shape)]
    count = math.prod(sizes)
    numbers = p.draw(st.lists(st.integers(0, bound - 1), min_size=count, max_size=count))
    return p.b.constant(np.array(numbers, np.int32).reshape(sizes))


def _gather(p: Pool_) -> Tensor:
    x = p.any(1)
    axis, shape = p.axis(x), list(x.shape)
    shape[axis] = p.integer(1, 4)
    return p.b.gather(x, _indices(p, shape, axis, x.shape[axis]), axis)


def _scatter_add(p: Pool_) -> Tensor:
    x = p.any(1)
    axis, shape = p.axis(x), list(x.shape)
    shape[axis] = p.integer(1, 4)
    return p.b.scatter_add(x, _indices(p, shape, axis, x.shape[axis]), p.like(*shape), axis)


def _top_k(p: Pool_) -> tuple[Tensor, ...]:
    x = p.any(1)
    values, positions = p.b.top_k(x, p.integer(1, x.shape[-1]), largest=p.flag())
    return values, p.b.cast(positions, "float32")


def _loop(p: Pool_) -> tuple[Tensor, ...]:
    x = p.any(1)
    p.made += 1
    name, other, swaps = f"p{p.made}", p.like(*x.shape), p.flag()

    def turn(b: Builder, carried: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (first, second), weight = carried, b.parameter(name, ((Axis("c", x.shape[-1]),),))
        mixed = b.tanh(first * weight + given[0])
        return (second, mixed) if swaps else (mixed, second + first)

    return p.b.loop(p.integer(1, 3), turn, (x, other), (p.beside(x),))


def _fft(p: Pool_) -> tuple[Tensor, ...]:
    x = p.any(1)
    return p.b.fft(x, p.like(*x.shape), p.axis(x), inverse=p.flag())


def _rfft(p: Pool_) -> tuple[Tensor, ...]:
    x = p.any(1)
    return p.b.rfft(x, p.axis(x))


def _irfft(p: Pool_) -> Tensor:
    x = p.any(1)
    axis = p.axis(x)
    size = x.shape[axis]
    return p.b.irfft(x, p.like(*x.shape), axis, 2 * size - (1 if size == 1 or p.flag() else 2))


def _long_conv(p: Pool_) -> Tensor:
    x = p.like(p.integer(1, 2), p.integer(1, 4), p.integer(1, 3))
    return p.b.long_conv(x, p.like(p.integer(1, x.shape[1]), x.shape[2]))


def _norm(kind: type[LayerNorm] | type[RmsNorm]) -> Recipe:
    def make(p: Pool_) -> Tensor:
        x = p.any(1)
        factors = [p.like(x.shape[-1]) for _ in range(p.integer(0, kind.max_factors))]
        return p.b.apply(kind(p.one_of((1e-5, 1e-3))), x, *factors)

    return make


def _batch_norm(p: Pool_) -> Tensor:
    x = p.any(2)
    scale, bias, mean, spread = (p.like(x.shape[-1]) for _ in range(4))
    return p.b.apply(BatchNorm(p.one_of((0.5, 1.0))), x, scale, bias, mean, p.b.square(spread))


def _along(kind: type[Softmax] | type[Cumsum]) -> Recipe:
    def make(p: Pool_) -> Tensor:
        x = p.any(1)
        return p.b.apply(kind(p.axis(x)), x)

    return make


def _reduce(kind: type[Sum] | type[Mean] | type[Max]) -> Recipe:
    def make(p: Pool_) -> Tensor:
        x = p.any(1)
        axes = p.draw(st.lists(st.integers(0, x.type.rank - 1), min_size=1, max_size=2, unique=True))
        return p.b.apply(kind(tuple(axis - x.type.rank * p.flag() for axis in axes), p.flag()), x)

    return make


def _linear_scan(p: Pool_) -> Tensor:
    x = p.any(2)
    return p.b.linear_scan(p.positive(p.like(*x.shape)), x)


def _outer_scan(p: Pool_) -> tuple[Tensor, ...]:
    batch, time, heads, keys, values = (
        p.integer(1, 2),
        p.integer(1, 4),
        p.integer(1, 2),
        p.integer(1, 3),
        p.integer(1, 3),
    )
    q, k, v = p.like(batch, time, heads, keys), p.like(batch, time, heads, keys), p.like(batch, time, heads, values)
    decay = p.one_of(DECAYS)
    shapes = {"none": (), "head": (q.shape[:3],), "key": (q.shape,), "state": (v.shape, (heads, keys, values))}[decay]
    gates = [-p.positive(p.like(*shape)) for shape in shapes]
    gates = [*gates[:1], *(-gate for gate in gates[1:])]
    state = p.like(batch, heads, keys, values) if p.flag() else None
    beta = p.positive(p.like(*q.shape[:3])) if decay != "state" and p.flag() else None
    form = p.one_of(("auto", "recurrent", "chunkwise", "parallel"))
    return p.b.outer_scan(q, k, v, *gates, decay=decay, scale=p.one_of((1.0, 0.5)), beta=beta, state=state, form=form)


def _reshape(p: Pool_) -> Tensor:
    x = p.any()
    divisors = [size for size in range(1, x.type.size + 1) if x.type.size % size == 0]
    first = p.one_of(divisors)
    return p.b.reshape(x, first, -1 if p.flag() else x.type.size // first)


def _transpose(p: Pool_) -> Tensor:
    x = p.any()
    return p.b.transpose(x, *p.draw(st.permutations(range(x.type.rank))))


def _slice(p: Pool_) -> Tensor:
    x = p.any(1)
    axis = p.axis(x)
    start = p.integer(0, x.shape[axis] - 1)
    return p.b.apply(Slice(axis, start, p.integer(start + 1, x.shape[axis]), p.integer(1, 2)), x)


def _concat(p: Pool_) -> Tensor:
    x = p.any(1)
    return p.b.concat(p.axis(x), *[x] * p.integer(1, 2), *[p.like(*x.shape) for _ in range(p.integer(0, 1))])


def _pad(p: Pool_) -> Tensor:
    x = p.any()
    sides = [tuple(p.integer(0, 1) for _ in x.shape) for _ in range(2)]
    return p.b.apply(Pad(*sides, value=p.one_of(NUMBERS)), x)


def _broadcast(p: Pool_) -> Tensor:
    x = p.any()
    return p.b.broadcast(x, *[p.integer(1, 2) for _ in range(p.integer(0, 1))], *x.shape)


def _matmul(p: Pool_) -> Tensor:
    x = p.any(2)
    first, second = p.flag(), p.flag()
    inner = x.shape[-2 if first else -1]
    columns = p.integer(1, 4)
    weight = p.like(columns, inner) if second else p.like(inner, columns)
    if p.flag():
        weight, second = p.b.transpose(weight, 1, 0), not second
    return p.b.matmul(x, weight, transpose_a=first, transpose_b=second)


def _conv(p: Pool_) -> Tensor:
    axes, groups, width = p.integer(1, 3), p.integer(1, 2), p.integer(1, 2)
    x = p.like(p.integer(1, 2), *[p.integer(2, 4) for _ in range(axes)], 2 * groups)
    weight = p.like(*[width] * axes, 2, groups * p.integer(1, 2))
    padding = tuple((p.integer(0, 1), p.integer(0, 1)) for _ in range(axes))
    strides, dilation = (p.integer(1, 2),) * axes, (p.integer(1, 1 if width == 2 else 2),) * axes
    return p.b.conv(x, weight, strides=strides, padding=padding, dilation=dilation, groups=groups)


def _pool(p: Pool_) -> Tensor:
    axes = p.integer(1, 2)
    x = p.like(p.integer(1, 2), *[p.integer(2, 4) for _ in range(axes)], 2)
    padding = tuple((p.integer(0, 1), p.integer(0, 1)) for _ in range(axes))
    op = Pool(p.one_of(("average", "max")), (2,) * axes, (p.integer(1, 2),) * axes, padding, p.flag())
    return p.b.pool(x, op)


def _attention(p: Pool_) -> Tensor:
    batch, keys, groups, size = p.integer(1, 2), p.integer(1, 4), p.integer(1, 2), p.integer(1, 3)
    queries, heads = p.integer(1, keys), groups * p.integer(1, 2)
    q, k, v = (p.like(batch, *rest) for rest in ((queries, heads, size), (keys, groups, size), (keys, groups, size)))
    offset = p.b.constant(np.array(p.integer(0, keys - queries), np.int32)) if p.flag() else None
    return p.b.attention(
        q,
        k,
        v,
        causal=p.flag(),
        window=p.one_of((None, 1, 2, 9)),
        alibi=tuple(p.one_of((0.0, 0.5)) for _ in range(heads)) if p.flag() else None,
        offset=offset,
        bias=p.like(heads, 1, keys) if p.flag() else None,
    )


def _rope(p: Pool_) -> Tensor:
    x = p.like(p.integer(1, 2), p.integer(1, 4), 2, 4)
    offset = p.b.constant(np.array(p.integer(0, 3), np.int32)) if p.flag() else None
    return p.b.rope(x, base=p.one_of((10000.0, 100.0)), offset=offset)


def _constant(p: Pool_) -> Tensor:
    shape = p.one_of(((), (3,), (2, 1), (5, 6)))
    numbers = p.draw(st.lists(st.floats(-4, 4, width=32), min_size=math.prod(shape), max_size=math.prod(shape)))
    return p.b.constant(np.array(numbers, np.float32).reshape(shape))


RECIPES: dict[type[Op], Recipe] = {
    **{type(op): _unary(op) for op in (Neg(), Abs(), Sin(), Cos(), Tanh(), Erf(), Sigmoid(), Relu(), Silu(), Gelu())},
    Softplus: _unary(Softplus()),
    Square: _unary(Square(), bounded=True),
    Exp: _unary(Exp(), bounded=True),
    **{type(op): _unary(op, positive=True) for op in (Log(), Sqrt(), Rsqrt())},
    **{type(op): _binary(op) for op in (Add(), Sub(), Mul(), Maximum(), Minimum())},
    Div: lambda p: p.b.apply(Div(), x := p.any(), p.one_of((p.positive(x), p.b.constant(-1.0)))),
    Pow: lambda p: p.b.apply(Pow(), p.positive(x := p.any()), p.b.tanh(p.beside(x))),
    Compare: _compare,
    Where: _where,
    Cast: _cast,
    Take: _take,
    DynamicUpdate: _dynamic_update,
    Gather: _gather,
    ScatterAdd: _scatter_add,
    TopK: _top_k,
    Loop: _loop,
    Fft: _fft,
    Rfft: _rfft,
    Irfft: _irfft,
    LongConv: _long_conv,
    Softmax: _along(Softmax),
    Cumsum: _along(Cumsum),
    LayerNorm: _norm(LayerNorm),
    RmsNorm: _norm(RmsNorm),
    BatchNorm: _batch_norm,
    LinearScan: _linear_scan,
    OuterScan: _outer_scan,
    Sum: _reduce(Sum),
    Mean: _reduce(Mean),
    Max: _reduce(Max),
    Reshape: _reshape,
    Transpose: _transpose,
    Slice: _slice,
    Concat: _concat,
    Pad: _pad,
    Broadcast: _broadcast,
    Matmul: _matmul,
    Conv: _conv,
    Pool: _pool,
    Attention: _attention,
    Rope: _rope,
    Constant: _constant,
}
"""How to add each operation to a random graph; inputs and parameters come with their readers."""


@st.composite
def graphs(draw: Any, recipes: Sequence[Recipe] = tuple(RECIPES.values()), max_steps: int = 12) -> Graph:
    """A graph of a few operations with one to three outputs; some nodes are dead."""
    b = Builder()
    p = Pool_(draw, b)
    p.floats.append(b.input("x", [p.integer(1, 2), p.integer(1, 4), p.integer(1, 4)]))
    for _ in range(p.integer(1, max_steps)):
        with b.scope(p.one_of(("", "layers.0", "layers.1.mixer"))):
            made = p.one_of(recipes)(p)
        results = made if isinstance(made, tuple) else (made,)
        p.floats.extend(result for result in results if result.type.size <= MAX_ELEMENTS)
    last = p.floats[-1]
    outputs = {f"out{index}": p.any() for index in range(p.integer(0, 2))}
    return b.build(last=last, **outputs)


def draw_values(graph: Graph, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random inputs and parameters, each depending on the seed and its own place in the graph."""
    rng = np.random.default_rng(seed)
    inputs = {name: draw_input(graph, node, rng) for name, node in graph.inputs.items()}
    params = {name: rng.standard_normal(node.types[0].shape) for name, node in graph.parameters.items()}
    return inputs, params


def run(graph: Graph, inputs: dict[str, np.ndarray], params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Evaluate in float64; random operands may overflow, which is then the expected result."""
    with np.errstate(all="ignore"):
        return evaluate(graph, inputs, params)


def reorder(graph: Graph, rng: np.random.Generator) -> Graph:
    """The same graph in another topological order, numbered anew."""
    waiting = {node.id: {operand.node for operand in node.operands} for node in graph.nodes}
    number: dict[int, int] = {}
    nodes: list[Node] = []
    while waiting:
        ready = sorted(node for node, operands in waiting.items() if operands <= number.keys())
        chosen = graph.node(int(rng.choice(ready)))
        del waiting[chosen.id]
        number[chosen.id] = len(nodes)
        operands = tuple(Value(number[value.node], value.index) for value in chosen.operands)
        nodes.append(Node(len(nodes), chosen.op, operands, chosen.types, chosen.scope))
    return Graph(nodes, [(name, Value(number[value.node], value.index)) for name, value in graph.outputs])
