"""Convolutions as components use them: on images parameters, padding and batch norm in one call; the axes of taps.

Shape letters: B batch, H W height and width, C channels, O output channels.
"""

from __future__ import annotations

from typing import Final

from ir.builder import Builder, Tensor
from ir.types import Axis

PAST: Final = "past"
"""Axis of the taps of a causal convolution, the earliest token's first."""
AROUND: Final = "around"
"""Axis of the taps of a centred convolution; its middle is tap `(K - 1) // 2`."""


def taps(size: int, *, causal: bool) -> Axis:
    """The axis of the taps of a convolution that keeps its input's size.

    In a supernet small kernels have the taps of large ones for the same tokens: the latest, or those in the middle.

    Args:
        size: Number of taps, K.
        causal: Whether the last tap falls on the token itself.
    """
    return Axis(PAST if causal else AROUND, size)


def conv(
    b: Builder,
    x: Tensor,
    name: str,
    outputs: int,
    *,
    window: int = 1,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    dilation: int = 1,
    bias: bool = False,
) -> Tensor:
    """x `[B, H, W, C]` under a new kernel `name` `[K, K, C / groups, O]`, plus a bias `name_bias` if asked.

    The padding is the same on all sides, by default what keeps the size at stride 1.
    """
    channels = x.shape[-1]
    around = dilation * (window - 1) // 2 if padding is None else padding
    axes = (
        (taps(window, causal=False) if padding is None else Axis("height", window),),
        (taps(window, causal=False) if padding is None else Axis("width", window),),
        (Axis("group", channels // groups),),
        (Axis("channels", outputs),),
    )
    y = b.conv(
        x,
        b.parameter(name, axes),
        strides=(stride, stride),
        padding=((around, around), (around, around)),
        dilation=(dilation, dilation),
        groups=groups,
    )
    return y + b.parameter(f"{name}_bias", ((Axis("channels", outputs),),), "constant(0)") if bias else y


def depthwise(
    b: Builder, x: Tensor, name: str, window: int, *, stride: int = 1, dilation: int = 1, bias: bool = True
) -> Tensor:
    """Each channel of x `[B, H, W, C]` under its own window; keeps the size at stride 1."""
    channels = x.shape[-1]
    return conv(b, x, name, channels, window=window, stride=stride, groups=channels, dilation=dilation, bias=bias)


def conv_norm(
    b: Builder,
    x: Tensor,
    name: str,
    outputs: int,
    *,
    window: int = 1,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """A convolution without bias and its batch norm `name_norm`, whose scale begins at `scale`."""
    y = conv(b, x, name, outputs, window=window, stride=stride, padding=padding, groups=groups)
    return b.batch_norm(y, f"{name}_norm", scale=scale)


def fill(b: Builder, x: Tensor, window: int) -> Tensor:
    """x `[B, H, W, C]` with zeros below and to the right, up to multiples of a window."""
    for axis in (1, 2):
        missing = -x.shape[axis] % window
        x = b.pad(x, axis, 0, missing) if missing else x
    return x
