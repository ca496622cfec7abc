"""Convolutions and poolings over odd sizes: padding, strides, dilation and groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.conv import ConvKernel
from codegen.kernels.window import WindowKernel, is_narrow
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
    family = WindowKernel if is_narrow(op, TensorType(w)) else ConvKernel
    return family(TensorType(x), TensorType(w), op, tail=tail)


def bias_silu(*shape: int, residual: bool = False) -> Graph:
    """A tail: one number for each channel, an activation, and maybe a tensor added last."""
    b = Builder()
    y = b.silu(b.input("x0", shape) + b.input("x1", shape[-1:]))
    return b.build(y=y + b.input("x2", shape) if residual else y)


def minus_scaled(*shape: int) -> Graph:
    """A tail: another tensor taken away, times one number for each channel; a number for each row and one for all."""
    b = Builder()
    y = (b.input("x0", shape) - b.input("x1", shape)) * b.input("x2", shape[-1:])
    return b.build(y=b.reshape(y * 0.5, *shape) + b.input("x3", (*shape[:-1], 1)) * b.input("x4", (1,)))


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
    "narrow_groups": conv(
        (1, 7, 9, 20), (3, 3, 4, 20), padding=((1, 1), (1, 1)), groups=5, tail=bias_silu(1, 7, 9, 20)
    ),
    "narrow_groups_wide": conv((2, 17, 32), (3, 2, 64), strides=(2,), padding=((2, 0),), groups=16),
    "narrow_groups_run_time": replace(conv((2, 17, 9), (3, 3, 12), padding=((1, 1),), groups=3), packed=False),
    "narrow_multiplier": conv((2, 9, 37), (4, 1, 74), padding=((3, 0),), groups=37),
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
    "depthwise_wide": conv((1, 40, 37), (19, 1, 37), padding=((18, 0),), groups=37, tail=bias_silu(1, 40, 37)),
    "depthwise_wide_2d": conv((1, 5, 25, 20), (3, 17, 1, 20), padding=((1, 1), (8, 8)), groups=20),
    "depthwise_spread": conv((1, 300, 5), (2, 1, 5), padding=((128, 0),), dilation=(128,), groups=5),
    "depthwise_far_pixels": conv((1, 30, 1024), (4, 1, 1024), padding=((3, 0),), groups=1024),
    "dense_far_pixels": conv((1, 17, 256), (3, 256, 16), padding=((1, 1),)),
    "grouped_run_time": replace(conv((2, 9, 6), (3, 2, 60), groups=3), packed=False),
    "depthwise_run_time": replace(conv((2, 9, 37), (3, 1, 37), groups=37), packed=False),
    "average_wide": pool((1, 40, 20), "average", (19,), (1,), ((9, 9),)),
    "average_wide_2d": pool((1, 4, 40, 5), "average", (3, 19), (1, 2), ((1, 1), (18, 0))),
    "average_counted_2d": pool((1, 6, 7, 20), "average", (3, 3), (1, 1), ((1, 1), (1, 1)), True),
    "average_minus_input": WindowKernel(
        TensorType((1, 6, 7, 20)), None, Pool("average", (3, 3), (1, 1), ((1, 1), (1, 1))), minus_scaled(1, 6, 7, 20)
    ),
    "max_wide": pool((1, 40, 20), "max", (18,), (2,), ((9, 8),)),
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


@st.composite
def windows(draw: Any) -> WindowKernel | ConvKernel:
    """Any operation over one or two axes; a pooling's padding stays below its window, as a mean of nothing is none."""
    axes = draw(st.integers(1, 2))

    def sizes(*values: int) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(axes))

    kind = draw(st.sampled_from(("average", "max", "depthwise", "conv")))
    window, strides = sizes(1, 2, 3, 5, 17), sizes(1, 1, 2, 3)
    dilation = sizes(1, 1, 2, 3) if kind in ("depthwise", "conv") else (1,) * axes
    reach = tuple((w - 1) * d + 1 for w, d in zip(window, dilation, strict=True))
    most = 6 if kind in ("depthwise", "conv") else min(window) - 1
    padding = tuple((draw(st.integers(0, most)), draw(st.integers(0, most))) for _ in range(axes))
    spatial = tuple(
        max(r - low - high, 1) + draw(st.integers(0, 20)) for r, (low, high) in zip(reach, padding, strict=True)
    )
    channels = draw(st.sampled_from((1, 3, 16, 20)))
    x = (draw(st.integers(1, 2)), *spatial, channels)
    if kind in ("average", "max"):
        return pool(x, kind, window, strides, padding, draw(st.booleans()))
    options = {"strides": strides, "padding": padding, "dilation": dilation}
    if kind == "depthwise":
        return conv(x, (*window, 1, channels), **options, groups=channels)
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if channels % g == 0]))
    outputs = groups * draw(st.sampled_from((2, 4, 5, 33)))
    return conv(x, (*window, channels // groups, outputs), **options, groups=groups)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=8)
@given(kernels=st.lists(windows(), min_size=4, max_size=8))
def test_random_window_equals_reference(isa: str, kernels: list[WindowKernel | ConvKernel]) -> None:
    """Any window, stride, padding, dilation and grouping gives what the interpreter gives."""
    check_all({str(index): kernel for index, kernel in enumerate(kernels)}, isa)


def test_convolution_that_mixes_channels_is_refused() -> None:
    """A window kernel has one channel a group, or a few."""
    with pytest.raises(ValueError, match="ConvKernel"):
        WindowKernel(TensorType((1, 5, 16)), TensorType((3, 8, 16)), Conv((1,), ((0, 0),), (1,), 2))


def test_max_pool_never_sees_padding() -> None:
    """A maximum over negative numbers stays negative at the borders."""
    kernel = KERNELS["max"]
    x = -np.abs(np.random.default_rng(0).standard_normal(kernel.inputs[0].shape)).astype(np.float32) - 1.0
    check_all({"max": kernel}, "avx2", inputs={"max": [x]})


def test_flops_count_the_taps_of_one_channel() -> None:
    """A depthwise convolution of 4 taps costs 8 operations an output."""
    assert KERNELS["depthwise_causal"].flops == 2 * 9 * 37 * 8
