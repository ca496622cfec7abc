"""Loops found behind reshapes and transposes, and what is written from them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels._nest import Nest, find_nest
from codegen.kernels.fused import FusedKernel
from ir.builder import Builder, Tensor
from tests.codegen.kernels.batches import ISAS, check_all


def chain(make: Any, *shapes: tuple[int, ...]) -> FusedKernel:
    """The chain `make(b, *inputs)`."""
    b = Builder()
    return FusedKernel(b.build(y=make(b, *(b.input(f"x{i}", shape) for i, shape in enumerate(shapes)))))


def patches(b: Builder, x: Tensor, side: int) -> Tensor:
    """Squares of an image `[1, H, W, C]` side by side."""
    _, height, width, channels = x.shape
    split = b.reshape(x, 1, height // side, side, width // side, side, channels)
    return b.reshape(b.transpose(split, 0, 1, 3, 2, 4, 5), 1, -1, side * side * channels)


KERNELS = {
    "transpose": chain(lambda b, x: b.transpose(x, 1, 0), (37, 53)),
    "transpose_whole": chain(lambda b, x: b.transpose(x, 0, 2, 1), (2, 32, 64)),
    "transpose_short": chain(lambda b, x: b.transpose(x, 0, 2, 1), (3, 9, 70)),
    "transpose_few_rows": chain(lambda b, x: b.transpose(x, 0, 2, 1), (3, 70, 9)),
    "transpose_residual": chain(lambda b, x, y, w: b.gelu(b.transpose(x, 1, 0)) * w + y, (33, 49), (49, 33), (33,)),
    "transpose_two": chain(lambda b, x, y: b.transpose(x, 1, 0) + b.transpose(b.tanh(y), 1, 0), (33, 49), (33, 49)),
    "transpose_column": chain(lambda b, x, y: b.transpose(x, 1, 0) * y, (33, 49), (49, 1)),
    "transpose_inner_axes": chain(lambda b, x: b.transpose(x, 0, 3, 1, 2), (2, 5, 7, 20)),
    "transpose_parallel": chain(lambda b, x: b.transpose(x, 0, 2, 1), (2, 150, 120)),
    "patches": chain(lambda b, x: patches(b, x, 4), (1, 12, 16, 3)),
    "patches_minus": chain(lambda b, x, y: patches(b, x, 3) - y, (1, 6, 9, 5), (1, 6, 45)),
    "slice_of_transpose": chain(lambda b, x: b.slice(b.transpose(x, 1, 0), 1, 3, 30), (37, 53)),
    "every_other_column": chain(lambda b, x: b.slice(x, 1, 1, 53, 2), (37, 53)),
    "rows_of_three": chain(lambda b, x: b.transpose(x, 1, 0), (3, 100)),
}


@pytest.mark.parametrize("isa", ISAS)
def test_nest_equals_interpreter(isa: str) -> None:
    """Squares at every kind of border, several of them, and chains that fall back to plain rows."""
    check_all(KERNELS, isa)


def test_nest_merges_what_moves_together() -> None:
    """Patches of 4 x 4 pixels of 3 channels are runs of 12 numbers, whatever shapes stood between."""
    nest = find_nest(KERNELS["patches"].graph)
    assert nest == Nest((3, 4, 4, 12), ("x0",), (0,), ((4 * 48, 12, 48, 1),))


def test_nest_reads_a_broadcast_vector_with_stride_zero() -> None:
    """Every read has its own strides over common loops."""
    nest = find_nest(chain(lambda b, x, w: b.transpose(x, 1, 0) * w, (33, 49), (33,)).graph)
    assert nest == Nest((49, 33), ("x0", "x1"), (0, 0), ((1, 49), (0, 1)))


def test_concatenation_has_no_fixed_strides() -> None:
    """What is read from one input here and another there is left to selections."""
    assert find_nest(chain(lambda b, x, y: b.concat(1, x, y), (3, 37), (3, 16)).graph) is None


@st.composite
def moves(draw: Any) -> FusedKernel:
    """Transposes, reshapes and slices of 8 to some thousand numbers, with a residual or none."""
    b = Builder()
    x = y = b.input("x", draw(st.lists(st.sampled_from((2, 3, 8, 12, 16, 20)), min_size=2, max_size=3)))
    for _ in range(draw(st.integers(1, 4))):
        match draw(st.sampled_from(("transpose", "transpose", "slice", "reshape", "tanh"))):
            case "transpose":
                y = b.transpose(y, *draw(st.permutations(range(y.type.rank))))
            case "slice":
                axis = draw(st.integers(0, y.type.rank - 1))
                y = b.slice(y, axis, draw(st.integers(0, min(2, y.shape[axis] - 1))), y.shape[axis])
            case "reshape":
                sizes = [size for size in range(2, y.type.size) if y.type.size % size == 0]
                y = b.reshape(y, draw(st.sampled_from(sizes)), -1) if sizes else y
            case _:
                y = b.tanh(y)
    return FusedKernel(b.build(y=y + b.input("r", y.shape) if draw(st.booleans()) or y is x else y))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=8)
@given(kernels=st.lists(moves(), min_size=4, max_size=8))
def test_random_moves_equal_interpreter(isa: str, kernels: list[FusedKernel]) -> None:
    """However a chain turns and cuts its input, each output gets the element it should."""
    check_all({str(index): kernel for index, kernel in enumerate(kernels)}, isa)
