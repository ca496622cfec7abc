"""Convolutions and poolings over odd sizes: padding, strides, dilation and groups."""

from __future__ import annotations

import numpy as np
import pytest

from codegen.kernels.conv import ConvKernel
from codegen.kernels.window import WindowKernel
from ir.builder import Builder
from ir.graph import Graph
from ir.ops.convolution import Conv, Pool
from ir.types import TensorType
from tests.codegen.kernels.batches import ISAS, check_all


def conv(
    x: tuple[int, ...], w: tuple[int, ...], *, strides=None, padding=None, dilation=None, groups=1, tail=None
) -> WindowKernel | ConvKernel:
    """A convolution; stride 1, no padding, no dilation unless said otherwise."""
    axes = len(x) - 2
    op = Conv(strides or (1,) * axes, padding or ((0, 0),) * axes, dilation or (1,) * axes, groups)
    family = WindowKernel if groups == x[-1] == w[-1] else ConvKernel
    return family(TensorType(x), TensorType(w), op, tail=tail)


def bias_silu(*shape: int, residual: bool = False) -> Graph:
    """A tail: one number for each channel, an activation, and maybe a tensor added last."""
    b = Builder()
    y = b.silu(b.input("x0", shape) + b.input("x1", shape[-1:]))
    return b.build(y=y + b.input("x2", shape) if residual else y)


def pool(x: tuple[int, ...], kind, window, strides, padding, counted: bool = False) -> WindowKernel:
    """A pooling."""
    return WindowKernel(TensorType(x), None, Pool(kind, window, strides, padding, counted))


KERNELS = {
    "depthwise_causal": conv((2, 9, 37), (4, 1, 37), padding=((3, 0),), groups=37),
    "depthwise_one_token": conv((1, 1, 20), (4, 1, 20), padding=((3, 0),), groups=20),
    "depthwise_same": conv((2, 9, 16), (3, 1, 16), padding=((1, 1),), groups=16),
    "depthwise_dilated": conv((2, 9, 5), (3, 1, 5), padding=((4, 0),), dilation=(2,), groups=5),
    "depthwise_2d": conv(
        (2, 9, 8, 37), (3, 3, 1, 37), strides=(2, 1), padding=((1, 1), (1, 2)), dilation=(1, 2), groups=37
    ),
    "depthwise_large": conv((2, 200, 70), (4, 1, 70), padding=((3, 0),), groups=70),
    "dense": conv((2, 9, 37), (3, 37, 20), padding=((1, 1),)),
    "dense_one_output": conv((2, 9, 3), (3, 3, 1)),
    "dense_one_input": conv((2, 9, 1), (3, 1, 20)),
    "dense_single_channel": conv((2, 9, 1), (3, 1, 1), padding=((0, 2),)),
    "dense_strided": conv((2, 9, 5), (3, 5, 33), strides=(2,), padding=((0, 1),)),
    "dense_padding_beyond_window": conv((1, 3, 2), (2, 2, 3), padding=((4, 3),)),
    "patches": conv((2, 8, 12, 3), (4, 4, 3, 24), strides=(4, 4)),
    "grouped": conv((2, 9, 6), (3, 2, 30), strides=(2,), padding=((0, 1),), groups=3),
    "grouped_multiplier": conv((2, 9, 6), (3, 1, 12), groups=6),
    "dense_3d": conv((1, 4, 3, 5, 2), (2, 1, 3, 2, 7), padding=((1, 0), (0, 0), (1, 1))),
    "depthwise_tail": conv((2, 9, 37), (4, 1, 37), padding=((3, 0),), groups=37, tail=bias_silu(2, 9, 37)),
    "depthwise_2d_tail": conv(
        (1, 6, 7, 20),
        (7, 7, 1, 20),
        padding=((3, 3), (3, 3)),
        groups=20,
        tail=bias_silu(1, 6, 7, 20, residual=True),
    ),
    "dense_tail": conv((2, 9, 37), (3, 37, 20), padding=((1, 1),), tail=bias_silu(2, 9, 20, residual=True)),
    "average": pool((2, 9, 37), "average", (3,), (1,), ((1, 1),)),
    "average_causal_counted": pool((2, 9, 37), "average", (3,), (2,), ((2, 0),), True),
    "average_all": pool((2, 9, 5), "average", (9,), (1,), ((0, 0),)),
    "average_3d": pool((1, 4, 3, 5, 2), "average", (2, 2, 2), (1, 1, 2), ((1, 0), (0, 1), (0, 0))),
    "max": pool((2, 9, 8, 37), "max", (3, 2), (2, 2), ((1, 1), (0, 0))),
    "max_one_channel": pool((2, 9, 1), "max", (2,), (2,), ((0, 0),)),
    "max_large": pool((2, 300, 65), "max", (5,), (1,), ((2, 2),)),
}


@pytest.mark.parametrize("isa", ISAS)
def test_window_equals_reference(isa: str) -> None:
    """Every tap inside the input counts once, none outside does; serial or parallel as the rule says."""
    check_all(KERNELS, isa)


def test_window_every_knob_gives_the_same() -> None:
    """With threads or without."""
    check_all(
        {name: KERNELS[name] for name in ("depthwise_2d", "grouped", "dense_tail", "max")}, "avx2", every_knob=True
    )


def test_max_pool_never_sees_padding() -> None:
    """A maximum over negative numbers stays negative at the borders."""
    kernel = KERNELS["max"]
    x = -np.abs(np.random.default_rng(0).standard_normal(kernel.inputs[0].shape)).astype(np.float32) - 1.0
    check_all({"max": kernel}, "avx2", inputs={"max": [x]})


def test_flops_count_the_taps_of_one_channel() -> None:
    """A depthwise convolution of 4 taps costs 8 operations an output."""
    assert KERNELS["depthwise_causal"].flops == 2 * 9 * 37 * 8
