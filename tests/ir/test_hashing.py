"""The canonical hash: which differences count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from ir.builder import Builder, Tensor
from ir.graph import Graph
from ir.hashing import canonical_hash
from ir.op import Op
from ir.ops.attention import Attention, Rope
from ir.ops.contraction import Matmul
from ir.ops.control import Body, Loop
from ir.ops.convolution import Conv, Pool
from ir.ops.elementwise import Add, Cast, Compare, Sub
from ir.ops.indexing import DynamicUpdate, Gather, ScatterAdd
from ir.ops.normalization import BatchNorm, LayerNorm, RmsNorm, Softmax
from ir.ops.recurrence import OuterScan
from ir.ops.reduction import Cumsum, Max, Mean, Sum
from ir.ops.shape import Broadcast, Concat, Pad, Reshape, Slice, Transpose
from ir.ops.sorting import TopK
from ir.ops.spectral import Fft, Irfft, Rfft
from ir.ops.structure import Component, Constant, Input, Parameter
from ir.types import Axis, TensorType
from tests.ir.completeness import missing_rows
from tests.ir.models import decoder

CUBE = TensorType((3, 3, 3))


def body(op: Op, flipped: bool = False) -> Body:
    """(x, y) -> x op y, or y op x; scopes and the names of inputs differ, which means nothing."""
    b = Builder()
    x, y = b.input("y" if flipped else "x", CUBE.shape), b.input("x" if flipped else "y", CUBE.shape)
    with b.scope("turn" if flipped else ""):
        return Body(b.build(r=b.apply(op, *((y, x) if flipped else (x, y)))))


PLACES = TensorType((3, 3, 3), "int32")
HEADS = TensorType((1, 3, 2, 2))
SCALAR = TensorType((), "int32")

ATTRIBUTES: dict[type[Op], tuple[Op, tuple[TensorType, ...], dict[str, object]]] = {
    Attention: (
        Attention(0.5),
        (HEADS, HEADS, HEADS),
        {"scale": 0.25, "causal": True, "window": 2, "alibi": (0.5, 0.25)},
    ),
    Rope: (Rope(), (HEADS,), {"base": 100.0}),
    Matmul: (Matmul(), (CUBE, CUBE), {"transpose_a": True, "transpose_b": True, "precision": "bfloat16"}),
    Conv: (
        Conv((1,), ((1, 1),), (1,)),
        (CUBE, CUBE),
        {"strides": (2,), "padding": ((2, 0),), "dilation": (2,)},
    ),
    Pool: (
        Pool("average", (2,), (1,), ((0, 1),)),
        (CUBE,),
        {"kind": "max", "window": (3,), "strides": (2,), "padding": ((1, 0),), "count_padding": True},
    ),
    Compare: (Compare("lt"), (CUBE, CUBE), {"kind": "le"}),
    Cast: (Cast("float16"), (CUBE,), {"dtype": "bfloat16"}),
    DynamicUpdate: (DynamicUpdate(0), (CUBE, CUBE, SCALAR), {}),
    Gather: (Gather(0), (CUBE, PLACES), {"axis": 1}),
    ScatterAdd: (ScatterAdd(0), (CUBE, PLACES, CUBE), {"axis": 1}),
    Loop: (Loop(2, body(Add())), (CUBE, CUBE), {"times": 3, "body": body(Sub())}),
    TopK: (TopK(2), (CUBE,), {"k": 1, "largest": False}),
    Fft: (Fft(0), (CUBE, CUBE), {"axis": 1, "inverse": True}),
    Rfft: (Rfft(0), (CUBE,), {"axis": 1}),
    Irfft: (Irfft(0, 5), (CUBE, CUBE), {"axis": 1, "length": 4}),
    Softmax: (Softmax(0), (CUBE,), {"axis": 1}),
    LayerNorm: (LayerNorm(), (CUBE,), {"epsilon": 1e-3}),
    RmsNorm: (RmsNorm(), (CUBE,), {"epsilon": 1e-3}),
    BatchNorm: (BatchNorm(), (CUBE, *[TensorType(CUBE.shape[-1:])] * 4), {"epsilon": 1e-3, "momentum": 0.2}),
    OuterScan: (OuterScan(), (HEADS, HEADS, HEADS), {"scale": 0.5}),
    Sum: (Sum((0,)), (CUBE,), {"axes": (1,), "keepdims": True}),
    Mean: (Mean((0,)), (CUBE,), {"axes": (1,), "keepdims": True}),
    Max: (Max((0,)), (CUBE,), {"axes": (1,), "keepdims": True}),
    Cumsum: (Cumsum(0), (CUBE,), {"axis": 1}),
    Reshape: (Reshape((9, 3)), (CUBE,), {"shape": (3, 9)}),
    Transpose: (Transpose((0, 2, 1)), (CUBE,), {"permutation": (1, 0, 2)}),
    Slice: (Slice(0, 0, 2), (CUBE,), {"axis": 1, "start": 1, "stop": 1 + 0, "stride": 1}),
    Concat: (Concat(0), (CUBE, CUBE), {"axis": 1}),
    Pad: (Pad((1, 0, 0), (0, 0, 0)), (CUBE,), {"low": (0, 1, 0), "high": (1, 0, 0), "value": 1.0}),
    Broadcast: (Broadcast((2, 3, 3, 3)), (CUBE,), {"shape": (4, 3, 3, 3)}),
    Input: (Input("x", CUBE), (), {"type": HEADS}),
    Parameter: (Parameter("w", ((Axis("a", 2),),)), (), {"axes": ((Axis("b", 2),),)}),
    Constant: (Constant.from_array(np.zeros(2)), (), {"data": b"\0\0\0\0\0\0\x80\x80"}),
    Component: (
        Component("norm", "rms_norm", (), (CUBE,)),
        (CUBE,),
        {"kind": "mixer", "key": "layer_norm", "options": (("epsilon", 1),), "types": (HEADS,)},
    ),
}
"""An example of each operation with attributes, and other values that mean something else."""


def applied(op: Op, types: tuple[TensorType, ...]) -> str:
    b = Builder()
    operands = [b.input(f"x{index}", kind.shape, kind.dtype) for index, kind in enumerate(types)]
    return canonical_hash(b.build(**{f"y{index}": y for index, y in enumerate(b.apply_all(op, *operands))}))


@pytest.mark.parametrize("kind", ATTRIBUTES, ids=lambda kind: kind.name)
def test_hash_differs_when_an_attribute_changes(kind: type[Op]):
    """Each other value of each attribute gives another hash."""
    op, types, changes = ATTRIBUTES[kind]
    hashes = [applied(op, types)]
    for name, value in changes.items():
        if value != getattr(op, name):
            hashes.append(
                applied(dataclasses.replace(op, **{name: value} | ({"stop": 3} if name == "start" else {})), types)
            )
    assert len(set(hashes)) == len(hashes)


def test_attribute_table_is_complete():
    """Every operation that has attributes is in the table above."""
    assert missing_rows(dict.fromkeys(ATTRIBUTES, 0), but=_Without()) == []


class _Without:
    """The operations without attributes."""

    def __contains__(self, kind: object) -> bool:
        return isinstance(kind, type) and not dataclasses.fields(kind)


def test_hash_ignores_hints_initial_distributions_and_scopes():
    """How a recurrence is computed, how a parameter starts and where a node stands do not count."""

    def build(scope: str, init: str, form: str) -> Graph:
        b = Builder()
        x = b.input("x", HEADS.shape)
        with b.scope(scope):
            k = b.parameter("k", ((), (Axis("t", 3),), (Axis("h", 2),), (Axis("d", 2),)), init)
            return b.build(y=b.outer_scan(x, k, x, form=form, chunk=8)[0])  # type: ignore[arg-type]

    assert canonical_hash(build("a", "fan_in", "recurrent")) == canonical_hash(build("b.c", "normal(1)", "chunkwise"))


def test_hash_of_a_loop_is_that_of_what_its_body_means():
    """A sum may be turned round, a difference not: which operand is carried counts, names and scopes do not."""
    sums = [applied(Loop(2, body(Add(), flipped)), (CUBE, CUBE)) for flipped in (False, True)]
    differences = [applied(Loop(2, body(Sub(), flipped)), (CUBE, CUBE)) for flipped in (False, True)]
    assert sums[0] == sums[1]
    assert differences[0] != differences[1]


def test_hash_tells_tied_from_untied_parameters():
    """An embedding that is also the head differs from two tables of equal axes."""
    assert canonical_hash(decoder(tied=True)) != canonical_hash(decoder(tied=False))


def two_products(first: str, second: str, third: str, fourth: str) -> str:
    """(x @ first) * sin(x @ second) beside (y @ third) + (y @ fourth), over named parameters."""
    b = Builder()
    x, y = b.input("x", (1, 2)), b.input("y", (1, 2))
    made: dict[str, Tensor] = {}
    for name in (first, second, third, fourth):
        made[name] = made.get(name) or b.parameter(name, ((Axis("d", 2),), (Axis("e", 2),)))
    left = b.matmul(x, made[first]) * b.tanh(b.matmul(x, made[second]))
    return canonical_hash(b.build(left=left, right=b.matmul(y, made[third]) + b.matmul(y, made[fourth])))


def test_hash_tells_which_parameters_are_shared():
    """Every pattern of sharing that is not a renaming or an exchange of summands has its own hash."""
    patterns = ["abcd", "aacd", "abad", "abbd", "abcc", "abab", "abaa", "abbb", "aaaa", "aacc", "aaac"]
    hashes = {pattern: two_products(*pattern) for pattern in patterns}
    assert len(set(hashes.values())) == len(patterns)
    assert two_products(*"abda") == hashes["abad"]
    assert two_products(*"wxyz") == hashes["abcd"]
    assert two_products(*"abba") == hashes["abab"]


def symmetric(order: list[int]) -> Graph:
    """Four exchangeable products, made in a given order."""
    b = Builder()
    x = b.input("x", (1, 2))
    axes = ((Axis("d", 2),), (Axis("e", 2),))
    weights = {index: b.parameter(f"w{index}", axes) for index in order}
    pairs = [b.matmul(x, weights[i]) * b.matmul(x, weights[j]) for i, j in ((0, 1), (2, 3))]
    return b.build(y=pairs[0] + pairs[1])


def test_hash_of_exchangeable_parameters_ignores_their_order():
    """Parameters that only their sharing tells apart hash alike in any order of definition."""
    hashes = {canonical_hash(symmetric(order)) for order in ([0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0])}
    assert len(hashes) == 1


def test_hash_tells_shared_components_from_equal_ones():
    """One component read twice shares its parameters; two equal components do not."""
    hashes: list[str] = []
    for count in (1, 2):
        b = Builder()
        x = b.input("x", (1, 2))
        parts = [b.component("norm", "rms_norm", (), x) for _ in range(count)]
        hashes.append(canonical_hash(b.build(y=b.matmul(parts[0], parts[-1], transpose_b=True))))
    assert hashes[0] != hashes[1]


def sums(make: Callable[[Builder, Tensor], Tensor]) -> str:
    b = Builder()
    return canonical_hash(b.build(y=b.tanh(make(b, b.input("x", (2, 3))))))


def test_hash_ignores_what_canonicalize_removes():
    """Neutral operations, repeated expressions and another way to write the same do not count."""
    plain = sums(lambda b, x: b.square(b.exp(x)))
    assert sums(lambda b, x: b.exp(x) * b.exp(x)) == plain
    assert sums(lambda b, x: b.square(b.exp(b.reshape(x, 2, 3) * 1.0)) + 0.0) == plain
    assert sums(lambda b, x: b.square(b.exp(b.transpose(b.transpose(x, 1, 0), 1, 0)))) == plain
    assert sums(lambda b, x: b.square(b.exp(x)) * 2.0) != plain


def test_hash_is_stable(golden: Callable[[str, str], None]):
    """Hashes key caches and journals: a change of the function must raise its version."""
    golden("ir/hash.txt", f"{canonical_hash(decoder())}\n{canonical_hash(decoder(tied=False))}")
