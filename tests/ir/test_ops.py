"""Each operation against numbers worked out another way: Python scalars, loops, limiting cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ir.builder import Builder
from ir.errors import GraphError
from ir.op import Op
from ir.ops.attention import Attention, Rope
from ir.ops.contraction import Matmul
from ir.ops.control import Body, Loop
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
from ir.ops.recurrence import LinearScan, OuterScan
from ir.ops.reduction import Cumsum, Max, Mean, Sum
from ir.ops.shape import Broadcast, Concat, Pad, Reshape, Slice, Transpose
from ir.ops.sorting import TopK
from ir.ops.spectral import Fft, Irfft, LongConv, Rfft
from ir.ops.structure import Component, Constant, Input, Parameter
from ir.types import Axis, TensorType
from tests.ir.completeness import missing_rows

RTOL = 1e-13
"""A few units in the last place of float64: sums here have at most some dozens of terms of one scale."""

SIGNED = [-30.0, -2.5, -1.0, -0.0, 0.0, 0.3, 1.0, 2.0, 30.0]
POSITIVE = [0.01, 0.5, 1.0, 2.0, 30.0]


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng([7, *shape]).standard_normal(shape)


def evaluate(op: Op, *operands: Any) -> Any:
    """Evaluate, after checking that shapes and dtypes are those inferred."""
    arrays = tuple(np.asarray(operand) for operand in operands)
    names = {"f": "float32", "i": "int32", "b": "bool"}
    types = op.infer_types(tuple(TensorType(array.shape, names[array.dtype.kind]) for array in arrays))
    results = op.evaluate_all(arrays)
    assert [result.shape for result in results] == [kind.shape for kind in types]
    assert [names[result.dtype.kind] for result in results] == [
        kind.dtype.replace("float16", "float32") for kind in types
    ]
    return results[0] if len(results) == 1 else results


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=RTOL)


def unary(op: Op, function: Callable[[float], float], points: list[float] = SIGNED) -> Callable[[], None]:
    return lambda: close(evaluate(op, np.array(points)), [function(point) for point in points])


def binary(op: Op, function: Callable[[float, float], float], points: list[float] = SIGNED) -> Callable[[], None]:
    def check() -> None:
        grid = evaluate(op, np.array(points)[:, None], np.array(POSITIVE))
        close(grid, [[function(a, b) for b in POSITIVE] for a in points])

    return check


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def check_compare() -> None:
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0])
    assert evaluate(Compare("lt"), a, b).tolist() == [True, False, False]
    assert evaluate(Compare("le"), a, b).tolist() == [True, True, False]
    assert evaluate(Compare("eq"), a, b).tolist() == [False, True, False]


def check_where() -> None:
    result = evaluate(Where(), np.array([[True], [False]]), np.array([1.0, 2.0]), np.array(9.0))
    assert result.tolist() == [[1, 2], [9, 9]]


def check_cast() -> None:
    values = np.array([-1.7, -0.0, 0.4, 2.9])
    assert evaluate(Cast("int32"), values).tolist() == [-1, 0, 0, 2]
    assert evaluate(Cast("bool"), values).tolist() == [True, False, True, True]
    assert evaluate(Cast("float32"), np.array([True, False])).tolist() == [1.0, 0.0]
    assert evaluate(Cast("float32"), np.array([3, -4])).tolist() == [3.0, -4.0]


def check_matmul() -> None:
    a, b = normal(2, 3, 4), normal(4, 5)
    expected = [[[sum(a[n, i, k] * b[k, j] for k in range(4)) for j in range(5)] for i in range(3)] for n in range(2)]
    close(evaluate(Matmul(), a, b), expected)
    close(evaluate(Matmul(transpose_b=True), a, b.T), expected)
    close(evaluate(Matmul(transpose_a=True), np.swapaxes(a, 1, 2), b), expected)
    coarse = np.array([[1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -1e30]])  # two ties: to the even neighbour
    rounded = [[1.0], [1.0 + 2.0**-6], [-(2.0**99) * 1.578125]]
    close(evaluate(Matmul(precision="bfloat16"), np.eye(3), coarse.T), rounded)
    close(evaluate(Matmul(precision="bfloat16"), coarse, np.eye(3)), np.transpose(rounded))


def check_conv() -> None:
    x, weight = normal(2, 5, 6, 4), normal(3, 2, 2, 6)
    found = evaluate(Conv((2, 1), ((1, 0), (2, 1)), (1, 2), groups=2), x, weight)
    expected = np.zeros_like(found)
    for n, i, j, o, di, dj, c in np.ndindex(*found.shape, 3, 2, 2):
        row, column = 2 * i + di - 1, j + 2 * dj - 2
        if 0 <= row < 5 and 0 <= column < 6:
            expected[n, i, j, o] += x[n, row, column, 2 * (o // 3) + c] * weight[di, dj, c, o]
    close(found, expected)


def check_pool() -> None:
    x = normal(2, 7, 3)
    padding = ((2, 1),)
    for kind, counted in itertools.product(("average", "max"), (False, True)):
        found = evaluate(Pool(kind, (3,), (2,), padding, counted), x)
        for n, t, c in np.ndindex(*found.shape):
            inside = [x[n, s, c] for s in range(2 * t - 2, 2 * t + 1) if 0 <= s < 7]
            average = sum(inside) / (3 if counted else len(inside))
            close(found[n, t, c], max(inside) if kind == "max" else average)


def check_take() -> None:
    table = normal(5, 3)
    close(evaluate(Take(), table, np.array([[4, 0], [1, 1]])), [[table[4], table[0]], [table[1], table[1]]])


def check_dynamic_update() -> None:
    base, update = np.arange(10.0).reshape(2, 5), np.full((2, 2), -1.0)
    assert evaluate(DynamicUpdate(-1), base, update, np.array(2)).tolist() == [[0, 1, -1, -1, 4], [5, 6, -1, -1, 9]]
    assert base[0, 2] == 2.0


def check_softmax() -> None:
    x = normal(3, 4) * 100
    found = evaluate(Softmax(0), x)
    shifted = [[math.exp(x[i, j] - max(x[:, j])) for j in range(4)] for i in range(3)]
    close(found, [[shifted[i][j] / sum(row[j] for row in shifted) for j in range(4)] for i in range(3)])


def check_layer_norm() -> None:
    x, scale, bias = normal(2, 3, 8), normal(8), normal(8) + 1
    plain = evaluate(LayerNorm(0.0), x)
    close(plain.mean(-1), np.zeros((2, 3)))
    close(plain.var(-1), np.ones((2, 3)))
    close(evaluate(LayerNorm(0.0), x, scale), plain * scale)
    close(evaluate(LayerNorm(0.0), x, scale, bias), plain * scale + bias)
    close(evaluate(LayerNorm(1e6), x), (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e6))


def check_batch_norm() -> None:
    x, scale, bias, mean = normal(3, 2, 4), normal(4), normal(4), normal(4)
    variance = np.square(normal(4))
    expected = [
        [
            [(x[i, t, c] - mean[c]) / math.sqrt(variance[c] + 0.5) * scale[c] + bias[c] for c in range(4)]
            for t in range(2)
        ]
        for i in range(3)
    ]
    close(evaluate(BatchNorm(0.5), x, scale, bias, mean, variance), expected)


def check_rms_norm() -> None:
    x, scale = normal(2, 8), normal(8)
    expected = [[x[i, j] / math.sqrt(sum(x[i] ** 2) / 8 + 0.5) * scale[j] for j in range(8)] for i in range(2)]
    close(evaluate(RmsNorm(0.5), x, scale), expected)


def check_linear_scan() -> None:
    a, b = normal(2, 5, 3), normal(2, 5, 3)
    found = evaluate(LinearScan(), a, b)
    unrolled = [sum(np.prod(a[:, s + 1 : t + 1], axis=1) * b[:, s] for s in range(t + 1)) for t in range(5)]
    close(found, np.stack(unrolled, axis=1))


def check_outer_scan() -> None:
    """Unrolled: o_t = scale * sum over s <= t of q_t . (decay from s to t) k_s v_s."""
    q, k, v, g = normal(2, 5, 3, 4), normal(2, 5, 3, 4) + 1, normal(2, 5, 3, 2), -abs(normal(2, 5, 3, 4))
    found, last = evaluate(OuterScan("key", 0.5), q, k, v, g)
    expected = np.zeros_like(found)
    for n, t, h, j in np.ndindex(*found.shape):
        for s in range(t + 1):
            kept = np.exp(g[n, s + 1 : t + 1, h].sum(axis=0))
            expected[n, t, h, j] += 0.5 * (q[n, t, h] * kept) @ k[n, s, h] * v[n, s, h, j]
    close(found, expected)
    close(found[:, -1], 0.5 * np.einsum("bhk,bhkv->bhv", q[:, -1], last))


def reduction(kind: type[Sum] | type[Mean] | type[Max], function: Callable[[list[float]], float]) -> Callable[[], None]:
    def check() -> None:
        x = normal(2, 3, 4)
        found = evaluate(kind((-3, 2)), x)
        close(found, [function([x[i, j, k] for i in range(2) for k in range(4)]) for j in range(3)])
        close(evaluate(kind((0, 2), True), x), found.reshape(1, 3, 1))

    return check


def check_cumsum() -> None:
    assert evaluate(Cumsum(-1), np.array([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]])).tolist() == [[1, 3, 7], [1, 2, 3]]


def check_reshape() -> None:
    assert evaluate(Reshape((3, -1)), np.arange(6.0).reshape(2, 3)).tolist() == [[0, 1], [2, 3], [4, 5]]


def check_transpose() -> None:
    x = normal(2, 3, 4)
    found = evaluate(Transpose((2, 0, 1)), x)
    assert all(found[k, i, j] == x[i, j, k] for i, j, k in np.ndindex(2, 3, 4))


def check_slice() -> None:
    assert evaluate(Slice(-1, 1, 6, 2), np.arange(14.0).reshape(2, 7)).tolist() == [[1, 3, 5], [8, 10, 12]]


def check_concat() -> None:
    assert evaluate(Concat(1), np.zeros((1, 2)), np.ones((1, 1))).tolist() == [[0, 0, 1]]


def check_pad() -> None:
    assert evaluate(Pad((0, 1), (1, 0), 7.0), np.array([[1.0, 2.0]])).tolist() == [[7, 1, 2], [7, 7, 7]]
    assert evaluate(Pad((), ()), np.array(3.0)).tolist() == 3.0


def check_broadcast() -> None:
    assert evaluate(Broadcast((2, 2, 3)), np.array([[1.0], [2.0]])).tolist() == [[[1] * 3, [2] * 3]] * 2


def check_attention() -> None:
    """Grouped heads, an offset, a window, alibi and a bias together, query by query."""
    q, k, v, bias = normal(2, 3, 4, 5), normal(2, 6, 2, 5), normal(2, 6, 2, 3), normal(4, 3, 6)
    slopes = (0.5, 0.25, 0.125, 2.0)
    op = Attention(0.7, causal=True, window=3, alibi=slopes, has_offset=True, has_bias=True)
    found = evaluate(op, q, k, v, np.array(2), bias)
    for n, t, h in np.ndindex(2, 3, 4):
        seen = [s for s in range(6) if 0 <= 2 + t - s < 3]
        scores = [0.7 * q[n, t, h] @ k[n, s, h // 2] - slopes[h] * (2 + t - s) + bias[h, t, s] for s in seen]
        weights = [math.exp(score) for score in scores]
        expected = sum(w * v[n, s, h // 2] for w, s in zip(weights, seen, strict=True)) / sum(weights)
        close(found[n, t, h], expected)


def check_rope() -> None:
    x = normal(1, 3, 2, 4)
    found = evaluate(Rope(100.0, has_offset=True), x, np.array(5))
    for t, h, i in np.ndindex(3, 2, 2):
        angle = (5 + t) * 100.0 ** (-i / 2)
        rotated = complex(x[0, t, h, i], x[0, t, h, i + 2]) * complex(math.cos(angle), math.sin(angle))
        close(found[0, t, h, [i, i + 2]], [rotated.real, rotated.imag])


def check_constant() -> None:
    op = Constant.from_array(np.array([[1.5, -0.0], [np.inf, 3.0]]))
    assert op.infer() == TensorType((2, 2))
    assert op.evaluate().tolist() == [[1.5, 0.0], [math.inf, 3.0]]
    assert np.signbit(op.evaluate()[0, 1])


def check_gather() -> None:
    """Every element is read where its index says, also where one index serves a whole row."""
    x, rng = normal(3, 5, 2), np.random.default_rng(0)
    full, shared = rng.integers(0, 5, (3, 4, 2)), rng.integers(0, 5, (1, 4, 1))
    found, rows = evaluate(Gather(-2), x, full), evaluate(Gather(1), x, shared)
    for i, j, k in np.ndindex(3, 4, 2):
        assert found[i, j, k] == x[i, full[i, j, k], k]
        assert rows[i, j, k] == x[i, shared[0, j, 0], k]


def check_scatter_add() -> None:
    """Updates add up where indices repeat; it is the transpose of gather."""
    base, updates, x = normal(3, 5, 2), normal(3, 4, 2), normal(3, 5, 2)
    indices = np.array([[[3], [0], [3], [3]]])
    found = evaluate(ScatterAdd(1), base, indices, updates)
    close(found[:, 3], base[:, 3] + updates[:, 0] + updates[:, 2] + updates[:, 3])
    close(found[:, 1:3], base[:, 1:3])
    gathered = evaluate(Gather(1), x, indices)
    close(((found - base) * x).sum(), (updates * gathered).sum())


def check_loop() -> None:
    """Turns of x = a x + b from 1 are a^T + b (a^T - 1) / (a - 1)."""
    op = Loop(5, geometric_body())
    value, last = op.evaluate(np.array([1.0, 2.0]), np.array([0.0, 0.0]), np.array([2.0, 3.0]), np.array([0.5, -1.0]))
    turns = [2.0**5 + 0.5 * (2.0**5 - 1), 2 * 3.0**5 - (3.0**5 - 1) / 2]
    before = [2.0**4 + 0.5 * (2.0**4 - 1), 2 * 3.0**4 - (3.0**4 - 1) / 2]
    assert np.allclose(value, turns, rtol=1e-14)  # float64
    assert np.allclose(last, before, rtol=1e-14)


def geometric_body() -> Body:
    """(x, previous, a, b) -> (a x + b, x)."""
    b = Builder()
    x, previous, rate, step = (b.input(name, (2,)) for name in ("x", "previous", "rate", "step"))
    del previous
    return Body(b.build(after=x * rate + step, before=x))


def check_top_k() -> None:
    """Python's stable sort, of numbers of which many are equal."""
    x = np.array([[2.0, -1.0, 2.0, 0.0, -0.0, 5.0], [1.0, 1.0, 1.0, -7.0, np.inf, -np.inf]])
    for largest, k in ((True, 4), (False, 6)):
        values, positions = TopK(k, largest).evaluate(x)
        for row, found, places in zip(x, values, positions, strict=True):
            order = sorted(range(6), key=lambda i, row=row: -row[i] if largest else row[i])[:k]
            assert places.tolist() == order
            assert found.tolist() == [row[i] for i in order]


def fourier(x: Any, sign: int) -> Any:
    """The transform along axis 1 by its definition."""
    size = x.shape[1]
    waves = np.exp(sign * 2j * np.pi * np.outer(np.arange(size), np.arange(size)) / size)
    return np.einsum("ft,ntk->nfk", waves, x)


def check_fft() -> None:
    """The sum over all waves, and back."""
    real, imaginary = normal(2, 5, 3), normal(2, 5, 3) + 1
    found = evaluate(Fft(-2), real, imaginary)
    expected = fourier(real + 1j * imaginary, -1)
    close(found[0], expected.real)
    close(found[1], expected.imag)
    back = evaluate(Fft(1, inverse=True), *found)
    close(back[0], real)
    close(back[1], imaginary)


def check_rfft() -> None:
    for size in (1, 2, 5, 6):
        x = normal(2, size, 3)
        found = evaluate(Rfft(1), x)
        expected = fourier(x, -1)[:, : size // 2 + 1]
        close(found[0], expected.real)
        close(found[1], expected.imag)


def check_irfft() -> None:
    """Odd and even lengths; imaginary parts at the ends count as zero."""
    for size in (1, 2, 5, 6):
        x = normal(2, size, 3)
        real, imaginary = evaluate(Rfft(1), x)
        imaginary[:, 0] = 7.0
        if size % 2 == 0:
            imaginary[:, -1] = 7.0
        close(evaluate(Irfft(1, size), real, imaginary), x)


def check_long_conv() -> None:
    x, taps = normal(2, 6, 3), normal(4, 3)
    found = evaluate(LongConv(), x, taps)
    for n, t, c in np.ndindex(2, 6, 3):
        close(found[n, t, c], sum(taps[s, c] * x[n, t - s, c] for s in range(min(t, 3) + 1)))


UNIT: dict[type[Op], Callable[[], None]] = {
    Neg: unary(Neg(), lambda x: -x),
    Exp: unary(Exp(), math.exp),
    Log: unary(Log(), math.log, POSITIVE),
    Sqrt: unary(Sqrt(), math.sqrt, POSITIVE),
    Rsqrt: unary(Rsqrt(), lambda x: x**-0.5, POSITIVE),
    Abs: unary(Abs(), abs),
    Sin: unary(Sin(), math.sin),
    Cos: unary(Cos(), math.cos),
    Tanh: unary(Tanh(), math.tanh),
    Erf: unary(Erf(), math.erf),
    Sigmoid: unary(Sigmoid(), logistic),
    Relu: unary(Relu(), lambda x: x if x > 0 else 0.0),
    Silu: unary(Silu(), lambda x: x * logistic(x)),
    Gelu: unary(Gelu(), lambda x: x * (1 - math.erfc(x / math.sqrt(2)) / 2)),
    Softplus: unary(Softplus(), lambda x: math.log1p(math.exp(x))),
    Square: unary(Square(), lambda x: x * x),
    Add: binary(Add(), lambda a, b: a + b),
    Sub: binary(Sub(), lambda a, b: a - b),
    Mul: binary(Mul(), lambda a, b: a * b),
    Div: binary(Div(), lambda a, b: a / b),
    Maximum: binary(Maximum(), max),
    Minimum: binary(Minimum(), min),
    Pow: binary(Pow(), lambda a, b: a**b, POSITIVE),
    Compare: check_compare,
    Where: check_where,
    Cast: check_cast,
    Matmul: check_matmul,
    Conv: check_conv,
    Pool: check_pool,
    Take: check_take,
    DynamicUpdate: check_dynamic_update,
    Gather: check_gather,
    ScatterAdd: check_scatter_add,
    TopK: check_top_k,
    Loop: check_loop,
    Fft: check_fft,
    Rfft: check_rfft,
    Irfft: check_irfft,
    LongConv: check_long_conv,
    Softmax: check_softmax,
    LayerNorm: check_layer_norm,
    BatchNorm: check_batch_norm,
    RmsNorm: check_rms_norm,
    LinearScan: check_linear_scan,
    OuterScan: check_outer_scan,
    Sum: reduction(Sum, sum),
    Mean: reduction(Mean, lambda values: sum(values) / len(values)),
    Max: reduction(Max, max),
    Cumsum: check_cumsum,
    Reshape: check_reshape,
    Transpose: check_transpose,
    Slice: check_slice,
    Concat: check_concat,
    Pad: check_pad,
    Broadcast: check_broadcast,
    Attention: check_attention,
    Rope: check_rope,
    Constant: check_constant,
}
"""A check for each operation that has a value of its own."""

STRUCTURE = {Input, Parameter, Component}


@pytest.mark.parametrize("kind", UNIT, ids=lambda kind: kind.name)
def test_op_matches_its_equation(kind: type[Op]):
    """The operation gives what its equation gives, at points or sizes chosen to be awkward."""
    UNIT[kind]()


def test_unit_table_is_complete():
    """Every operation with a value of its own has a unit test."""
    assert missing_rows(UNIT, but=STRUCTURE) == []


X = TensorType((2, 3, 4))
IDS = TensorType((2, 3), "int32")
FLAGS = TensorType((2, 3, 4), "bool")
HEADS = TensorType((2, 5, 4, 6))

REFUSED: list[tuple[Op, tuple[TensorType, ...]]] = [
    (Exp(), (IDS,)),
    (Loop(0, geometric_body()), (TensorType((2,)),) * 4),
    (Loop(2, geometric_body()), (TensorType((2,)),) * 3),
    (Loop(2, geometric_body()), (TensorType((3,)),) * 4),
    (Exp(), (X, X)),
    (Add(), (X, TensorType((2, 3, 5)))),
    (Add(), (X, IDS)),
    (Add(), (FLAGS, FLAGS)),
    (Div(), (IDS, IDS)),
    (Compare("gt"), (X, X)),  # type: ignore[arg-type]
    (Where(), (X, X, X)),
    (Cast("float64"), (X,)),
    (Matmul(), (X, TensorType((3, 5)))),
    (Matmul(), (X, TensorType((4,)))),
    (Conv((1,), ((0, 0),), (1,)), (X, TensorType((4, 4, 2)))),
    (Conv((1,), ((0, 0),), (1,), groups=3), (X, TensorType((1, 4, 2)))),
    (Conv((0,), ((0, 0),), (1,)), (X, TensorType((1, 4, 2)))),
    (Conv((1,), ((0, -1),), (1,)), (X, TensorType((1, 4, 2)))),
    (Conv((1, 1), ((0, 0),), (1,)), (X, TensorType((1, 4, 2)))),
    (Pool("median", (1,), (1,), ((0, 0),)), (X,)),  # type: ignore[arg-type]
    (Pool("max", (9,), (1,), ((0, 0),)), (X,)),
    (Pool("max", (1,), (1,), ((0, 0),)), (FLAGS,)),
    (Take(), (X, X)),
    (Take(), (TensorType(()), IDS)),
    (Gather(1), (X, X)),
    (Gather(1), (X, TensorType((3, 2, 1), "int32"))),
    (Gather(3), (X, TensorType((2, 2, 1), "int32"))),
    (ScatterAdd(1), (X, TensorType((2, 2, 1), "int32"), X)),
    (ScatterAdd(1), (X, TensorType((2, 3, 1), "int32"), TensorType((2, 3, 5)))),
    (ScatterAdd(0), (FLAGS, TensorType((2, 3, 4), "int32"), FLAGS)),
    (TopK(5), (X,)),
    (TopK(0), (X,)),
    (TopK(1), (IDS,)),
    (Fft(1), (X, TensorType((2, 3, 5)))),
    (Fft(3), (X, X)),
    (Rfft(1), (IDS,)),
    (Irfft(1, 6), (X, X)),
    (Irfft(2, 6), (X, TensorType((2, 3, 3)))),
    (LongConv(), (X, TensorType((4, 4)))),
    (LongConv(), (X, TensorType((2, 3)))),
    (DynamicUpdate(1), (X, TensorType((2, 4, 4)), TensorType((), "int32"))),
    (DynamicUpdate(1), (X, TensorType((2, 1, 4)), TensorType((1,), "int32"))),
    (DynamicUpdate(1), (X, TensorType((2, 1, 4), "float16"), TensorType((), "int32"))),
    (Softmax(3), (X,)),
    (BatchNorm(), (X, *[TensorType((3,))] * 4)),
    (BatchNorm(), (X, *[TensorType((4,))] * 3)),
    (LayerNorm(), (X, TensorType((3,)))),
    (LayerNorm(), (X, TensorType((4,)), TensorType((4,)), TensorType((4,)))),
    (RmsNorm(), (X, TensorType((4,)), TensorType((4,)))),
    (LinearScan(), (X, TensorType((2, 3, 1)))),
    (OuterScan(), (HEADS, HEADS, TensorType((2, 4, 4, 6)))),
    (OuterScan("head"), (HEADS, HEADS, HEADS)),
    (OuterScan("head"), (HEADS, HEADS, HEADS, HEADS)),
    (OuterScan(chunk=0), (HEADS, HEADS, HEADS)),
    (OuterScan(has_state=True), (HEADS, HEADS, HEADS, TensorType((2, 4, 6, 6), "float16"))),
    (Sum((0, 0)), (X,)),
    (Sum((0, -3)), (X,)),
    (Sum(()), (X,)),
    (Cumsum(0), (TensorType(()),)),
    (Reshape((5, -1)), (X,)),
    (Reshape((-1, -1)), (X,)),
    (Transpose((0, 1)), (X,)),
    (Slice(1, 2, 2), (X,)),
    (Slice(1, 0, 4), (X,)),
    (Slice(1, 0, 2, 0), (X,)),
    (Concat(0), ()),
    (Concat(0), (X, TensorType((2, 3, 5)))),
    (Pad((0,), (0,)), (X,)),
    (Pad((-1, 0, 0), (0, 0, 0)), (X,)),
    (Broadcast((2, 3)), (X,)),
    (Attention(1.0), (HEADS, HEADS, TensorType((2, 5, 3, 6)))),
    (Attention(1.0), (HEADS, TensorType((2, 5, 3, 6)), TensorType((2, 5, 3, 6)))),
    (Attention(1.0, window=0), (HEADS, HEADS, HEADS)),
    (Attention(1.0, alibi=(1.0,)), (HEADS, HEADS, HEADS)),
    (Attention(1.0, has_offset=True), (HEADS, HEADS, HEADS)),
    (Attention(1.0, has_offset=True), (HEADS, HEADS, HEADS, TensorType(()))),
    (Attention(1.0, has_bias=True), (HEADS, HEADS, HEADS, TensorType((2, 1)))),
    (Rope(), (X,)),
    (Rope(), (TensorType((2, 5, 4, 5)),)),
    (Rope(-1.0), (HEADS,)),
    (Rope(has_offset=True), (HEADS, TensorType((1,), "int32"))),
    (Constant(TensorType((2,)), b"1234"), ()),
]


@pytest.mark.parametrize(("op", "operands"), REFUSED, ids=lambda value: value.name if isinstance(value, Op) else "")
def test_op_refuses_operands_that_do_not_fit(op: Op, operands: tuple[TensorType, ...]):
    """A shape rule that is broken is a GraphError that says so."""
    with pytest.raises(GraphError):
        op.infer_types(operands)


# -- limiting cases ----------------------------------------------------------------------------------------------------


def test_attention_with_a_wide_window_equals_full():
    """A window of at least T keys hides nothing; one of 1 keeps the token itself."""
    q, k, v = normal(2, 5, 4, 6), normal(2, 5, 4, 6) + 1, normal(2, 5, 4, 6) - 1
    for causal in (False, True):
        full = Attention(0.5, causal=causal).evaluate(q, k, v)
        np.testing.assert_array_equal(Attention(0.5, causal=causal, window=5).evaluate(q, k, v), full)
        close(Attention(0.5, causal=causal, window=1).evaluate(q, k, v), v)


def test_attention_repeats_keys_for_grouped_heads():
    """Two heads that share a key head give what they give with that head repeated."""
    q, k, v = normal(2, 5, 4, 6), normal(2, 5, 2, 6), normal(2, 5, 2, 3)
    repeated = Attention(0.5).evaluate(q, np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2))
    np.testing.assert_array_equal(Attention(0.5).evaluate(q, k, v), repeated)


def test_attention_with_an_offset_continues_a_sequence():
    """The last queries with a run-time offset, over a longer padded cache, give the end of the whole sequence."""
    q, k, v = normal(1, 6, 2, 4), normal(1, 6, 2, 4) + 1, normal(1, 6, 2, 4) - 1
    whole = Attention(0.5, causal=True, alibi=(0.5, 0.1)).evaluate(q, k, v)
    cache_k, cache_v = (np.concatenate([x, np.full((1, 3, 2, 4), 99.0)], axis=1) for x in (k, v))
    stepped = Attention(0.5, causal=True, alibi=(0.5, 0.1), has_offset=True)
    close(stepped.evaluate(q[:, 4:], cache_k, cache_v, np.array(4)), whole[:, 4:])
    close(Attention(0.5, causal=True, alibi=(0.5, 0.1)).evaluate(q[:, 4:], k, v), whole[:, 4:])


def test_attention_that_sees_nothing_gives_zeros():
    """A query before every key it may see gives zeros, not NaN."""
    op = Attention(1.0, causal=True, has_offset=True)
    found = op.evaluate(normal(1, 2, 1, 3), normal(1, 4, 1, 3), normal(1, 4, 1, 3), np.array(-1))
    assert found[0, 0].tolist() == [[0.0, 0.0, 0.0]]
    assert np.all(found[0, 1] != 0)


@pytest.mark.parametrize("queries", [1, 4, 7])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_visible_pairs(queries: int, window: int | None, causal: bool):
    """The closed form counts what the mask shows, with fewer and with more queries than keys."""
    op = Attention(1.0, causal=causal, window=window)
    distance = 5 - queries + np.arange(queries)[:, None] - np.arange(5)
    assert op.visible_pairs(queries, 5) == op.visible(distance).sum()


def scan_operands(values: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return normal(2, 5, 3, 4), normal(2, 5, 3, 4) + 1, normal(2, 5, 3, values)


def assert_scans_equal(first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> None:
    for a, b in zip(first, second, strict=True):
        close(a, b)


def test_outer_scan_with_zero_decay_equals_none():
    """A logarithm of zero keeps the state whole, whatever the kind of decay."""
    q, k, v = scan_operands()
    plain = OuterScan("none").evaluate(q, k, v)
    assert_scans_equal(OuterScan("head").evaluate(q, k, v, np.zeros((2, 5, 3))), plain)
    assert_scans_equal(OuterScan("key").evaluate(q, k, v, np.zeros((2, 5, 3, 4))), plain)
    assert_scans_equal(OuterScan("state").evaluate(q, k, v, np.zeros((2, 5, 3, 2)), normal(3, 4, 2)), plain)


def test_outer_scan_decays_agree_where_they_say_the_same():
    """A decay for each head equals that decay repeated for each key, and for each key and value at rate one."""
    q, k, v = scan_operands()
    g = -abs(normal(2, 5, 3))
    by_head = OuterScan("head").evaluate(q, k, v, g)
    assert_scans_equal(OuterScan("key").evaluate(q, k, v, np.repeat(g[..., None], 4, axis=-1)), by_head)
    by_state = OuterScan("state").evaluate(q, k, v, np.repeat(g[..., None], 2, axis=-1), np.ones((3, 4, 2)))
    assert_scans_equal(by_state, by_head)


def test_outer_scan_state_decay_equals_key_decay_at_a_rate_constant_in_values():
    """With one step size for all values and rates that vary by key only, the state decay is a key decay."""
    q, k, v = scan_operands()
    step, rate = -abs(normal(2, 5, 3)), abs(normal(3, 4))
    by_key = OuterScan("key").evaluate(q, k, v, step[..., None] * rate)
    rates = np.repeat(rate[..., None], 2, axis=-1)
    assert_scans_equal(OuterScan("state").evaluate(q, k, v, np.repeat(step[..., None], 2, axis=-1), rates), by_key)


def test_outer_scan_with_strong_decay_forgets():
    """With a decay to nothing only the current token counts."""
    q, k, v = scan_operands()
    found, _ = OuterScan("head").evaluate(q, k, v, np.full((2, 5, 3), -np.inf))
    close(found, (q * k).sum(axis=-1, keepdims=True) * v)


@pytest.mark.parametrize("cut", [1, 3])
def test_outer_scan_resumes_from_its_state(cut: int):
    """The first tokens, then the rest from the state they left, give the whole."""
    q, k, v = scan_operands()
    g = -abs(normal(2, 5, 3, 4))
    whole, last = OuterScan("key").evaluate(q, k, v, g)
    first, state = OuterScan("key").evaluate(*(x[:, :cut] for x in (q, k, v, g)))
    second, end = OuterScan("key", has_state=True).evaluate(*(x[:, cut:] for x in (q, k, v, g)), state)
    close(np.concatenate([first, second], axis=1), whole)
    close(end, last)


def test_linear_scan_with_ones_is_a_running_sum():
    """a = 1 accumulates, a = 0 passes b through."""
    b = normal(2, 5, 3)
    close(LinearScan().evaluate(np.ones_like(b), b), np.cumsum(b, axis=1))
    close(LinearScan().evaluate(np.zeros_like(b), b), b)


def test_rope_preserves_norms_and_depends_on_distance_only():
    """Rotation keeps lengths, and a score of two rotated vectors depends on the distance of their positions."""
    q, k = (np.repeat(normal(1, 1, 1, size), 9, axis=1)[..., :6] for size in (6, 7))
    turned_q, turned_k = Rope().evaluate(q), Rope().evaluate(k)
    close(np.linalg.norm(turned_q, axis=-1), np.linalg.norm(q, axis=-1))
    scores = turned_q[0, :, 0] @ turned_k[0, :, 0].T
    for distance in range(-8, 9):
        diagonal = np.diagonal(scores, distance)
        close(diagonal, np.full(diagonal.shape, diagonal[0]))
    assert abs(scores[0, 0] - scores[0, 4]) > 1e-3


def test_causal_depthwise_conv_sees_the_past_only():
    """Padding before only makes a convolution whose output t reads inputs up to t."""
    x, weight = normal(1, 6, 2), normal(3, 1, 2)
    op = Conv((1,), ((2, 0),), (1,), groups=2)
    later = x.copy()
    later[:, 4:] = 0
    close(op.evaluate(later, weight)[:, :4], op.evaluate(x, weight)[:, :4])
    close(op.evaluate(x, weight)[0, 0], x[0, 0] * weight[2, 0])


def test_sigmoid_and_softplus_do_not_overflow():
    """Far from zero the functions reach their limits without warnings."""
    far = np.array([-1e4, 1e4])
    assert Sigmoid().evaluate(far).tolist() == [0.0, 1.0]
    assert Softplus().evaluate(far).tolist() == [0.0, 1e4]
    assert Softmax().evaluate(far).tolist() == [0.0, 1.0]


def test_parameter_type_is_the_product_of_its_axes():
    """Each dimension is the product of its factors; an empty tuple of factors is a dimension of one."""
    op = Parameter("w", ((Axis("heads", 2), Axis("head_dim", 3)), (), (Axis("d_model", 5),)))
    assert op.infer() == TensorType((6, 1, 5))
