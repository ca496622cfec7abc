"""What people run on CPUs: encoders, vision blocks of published widths, and language models with their decode steps.

Shape letters: B batch, T tokens, H W pixels, D model width, N heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from ir.builder import Builder, Tensor
from ir.graph import Graph
from ir.ops.convolution import Pool
from ir.types import Axis
from nas.suites import SuiteModel
from searchspaces.architecture import Architecture, ComponentConfig, LayerConfig, ModelConfig, StageConfig
from searchspaces.signature import Signature

BYTES: Final = 256  # language models read bytes, so that the table and the head stay beside the point
LAYER_SCALE: Final = "constant(0.1)"


def _vector(b: Builder, name: str, size: int, init: str) -> Tensor:
    return b.parameter(name, ((Axis("d_model", size),),), init)


def _layer_norm(b: Builder, x: Tensor, name: str) -> Tensor:
    width = x.shape[-1]
    return b.layer_norm(
        x, _vector(b, f"{name}_scale", width, "constant(1)"), _vector(b, f"{name}_bias", width, "constant(0)")
    )


def _mlp(b: Builder, x: Tensor, hidden: int) -> Tensor:
    width = x.shape[-1]
    up = b.linear(x, "up", (Axis("hidden", hidden),), bias=True)
    weight = b.parameter("down", ((Axis("hidden", hidden),), (Axis("d_model", width),)))
    return b.matmul(b.gelu(up), weight) + _vector(b, "down_bias", width, "constant(0)")


def _self_attention(b: Builder, x: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    width = x.shape[-1]
    factors = (Axis("heads", heads), Axis("head_dim", width // heads))
    q, k, v = (b.split_heads(b.linear(x, name, factors, bias=True), heads) for name in ("q", "k", "v"))
    mixed = b.merge_heads(b.attention(q, k, v, bias=bias))
    out = b.parameter("out", (factors, (Axis("d_model", width),)))
    return b.matmul(mixed, out) + _vector(b, "out_bias", width, "constant(0)")


def _transformer_layer(b: Builder, x: Tensor, heads: int, hidden: int) -> Tensor:
    x = x + _self_attention(b, _layer_norm(b, x, "norm_mixer"), heads)
    return x + _mlp(b, _layer_norm(b, x, "norm_channel"), hidden)


def encoder(tokens: int, width: int = 768, heads: int = 12, hidden: int = 3072, depth: int = 2) -> Graph:
    """Pre-norm layers of the base size of BERT (Devlin et al. 2018), without its embedding."""
    b = Builder()
    x = b.input("x", (1, tokens, width))
    for index in range(depth):
        with b.scope(f"layers.{index}"):
            x = _transformer_layer(b, x, heads, hidden)
    return b.build(y=x)


def vit_tiny() -> Graph:
    """ViT-Tiny with 16 x 16 patches of 224 x 224 pixels (Touvron et al. 2020, DeiT-Ti)."""
    b, width = Builder(), 192
    image = b.input("image", (1, 224, 224, 3))
    patch = (Axis("height", 16),), (Axis("width", 16),), (Axis("channels", 3),), (Axis("d_model", width),)
    patches = b.conv(image, b.parameter("stem", patch), strides=(16, 16)) + _vector(b, "stem_bias", width, "normal(1)")
    summary = b.parameter("class_token", ((Axis("one", 1),), (Axis("tokens", 1),), (Axis("d_model", width),)))
    x = b.concat(1, summary, b.reshape(patches, 1, 196, width))
    x = x + b.parameter("positions", ((Axis("tokens", 197),), (Axis("d_model", width),)), "normal(1)")
    for index in range(12):
        with b.scope(f"layers.{index}"):
            x = _transformer_layer(b, x, heads=3, hidden=768)
    first = b.reshape(b.slice(_layer_norm(b, x, "norm"), 1, 0, 1), 1, width)
    return b.build(logits=b.linear(first, "head", (Axis("classes", 1000),), bias=True))


def _on_images(width: int, depth: int, block: Callable[[Builder, Tensor, int], Tensor]) -> Graph:
    """Blocks on 14 x 14 pixels: stage 3 of the usual pyramids at 224 x 224."""
    b = Builder()
    x = b.input("x", (1, 14, 14, width))
    for index in range(depth):
        with b.scope(f"layers.{index}"):
            x = block(b, x, index)
    return b.build(y=x)


def _group_norm(b: Builder, x: Tensor, name: str) -> Tensor:
    """One group: mean and variance over all pixels and channels, a factor for each channel."""
    width = x.shape[-1]
    flat = b.layer_norm(b.reshape(x, 1, x.type.size))
    scale, bias = _vector(b, f"{name}_scale", width, "constant(1)"), _vector(b, f"{name}_bias", width, "constant(0)")
    return b.reshape(flat, *x.shape) * scale + bias


def _poolformer_block(b: Builder, x: Tensor, index: int) -> Tensor:
    del index
    width = x.shape[-1]
    normed = _group_norm(b, x, "norm_mixer")
    pooled = b.pool(normed, Pool("average", (3, 3), (1, 1), ((1, 1), (1, 1)))) - normed
    x = x + pooled * _vector(b, "scale_mixer", width, LAYER_SCALE)
    return x + _mlp(b, _group_norm(b, x, "norm_channel"), 4 * width) * _vector(b, "scale_channel", width, LAYER_SCALE)


def _convnext_block(b: Builder, x: Tensor, index: int) -> Tensor:
    del index
    width = x.shape[-1]
    weight = b.parameter(
        "conv", ((Axis("height", 7),), (Axis("width", 7),), (Axis("group", 1),), (Axis("d_model", width),))
    )
    y = b.conv(x, weight, padding=((3, 3), (3, 3)), groups=width) + _vector(b, "conv_bias", width, "constant(0)")
    return x + _mlp(b, _layer_norm(b, y, "norm"), 4 * width) * _vector(b, "scale", width, LAYER_SCALE)


def _roll(b: Builder, x: Tensor, by: int) -> Tensor:
    """Turn height and width cyclically by so many pixels."""
    for axis in (1, 2):
        cut = by % x.shape[axis]
        x = b.concat(axis, b.slice(x, axis, cut, x.shape[axis]), b.slice(x, axis, 0, cut))
    return x


def _swin_block(b: Builder, x: Tensor, index: int) -> Tensor:
    """Windows of 7 x 7, shifted by 3 in every other block (Liu et al. 2021)."""
    width, window, heads = x.shape[-1], 7, 12
    shift = 3 if index % 2 else 0
    y = _layer_norm(b, x, "norm_mixer")
    y = _roll(b, y, shift) if shift else y
    y = b.reshape(b.transpose(b.reshape(y, 1, 2, window, 2, window, width), 0, 1, 3, 2, 4, 5), 4, window**2, width)
    table = b.parameter("relative_bias", ((Axis("offsets", 13 * 13),), (Axis("heads", heads),)), "normal(1)")
    bias = b.transpose(b.take(table, b.constant(_relative_positions(window))), 2, 0, 1)
    bias = b.reshape(bias, 1, heads, window**2, window**2)
    if shift:
        bias = bias + b.constant(_shift_mask(window, shift))
    y = _self_attention(b, y, heads, bias)
    y = b.reshape(b.transpose(b.reshape(y, 1, 2, 2, window, window, width), 0, 1, 3, 2, 4, 5), *x.shape)
    x = x + (_roll(b, y, -shift) if shift else y)
    return x + _mlp(b, _layer_norm(b, x, "norm_channel"), 4 * width)


def _relative_positions(window: int) -> np.ndarray:
    """Row of the bias table for each pair of pixels `[W * W, W * W]`."""
    row, column = (axis.ravel() for axis in np.mgrid[:window, :window])
    return (row[:, None] - row + window - 1) * (2 * window - 1) + column[:, None] - column + window - 1


def _shift_mask(window: int, shift: int) -> np.ndarray:
    """Large negative numbers between pixels that the turn brought together, `[4, 1, W * W, W * W]`."""
    side = 2 * window
    zone = (np.arange(side) >= side - window).astype(int) + (np.arange(side) >= side - shift)
    zones = (3 * zone[:, None] + zone).reshape(2, window, 2, window).transpose(0, 2, 1, 3).reshape(4, 1, -1)
    return np.where(zones[..., :, None] == zones[..., None, :], 0.0, -100.0)


def mixer_small(tokens: int = 196, width: int = 512, depth: int = 8) -> Graph:
    """The blocks of MLP-Mixer-S/16 (Tolstikhin et al. 2021)."""
    b = Builder()
    x = b.input("x", (1, tokens, width))
    for index in range(depth):
        with b.scope(f"layers.{index}"):
            y = b.transpose(_layer_norm(b, x, "norm_mixer"), 0, 2, 1)
            with b.scope("mixer"):
                y = _mlp(b, y, 256)
            x = x + b.transpose(y, 0, 2, 1)
            x = x + _mlp(b, _layer_norm(b, x, "norm_channel"), 2048)
    return b.build(y=x)


def _language_model(
    mixer: ComponentConfig,
    channel_mixer: ComponentConfig,
    depth: int,
    *,
    tokens: int,
    position: str = "none",
    step: bool = False,
) -> Graph:
    layer = LayerConfig(ComponentConfig("pre_norm"), mixer, channel_mixer)
    model = ModelConfig(
        stages=(StageConfig(512, (layer,) * depth),),
        norm=ComponentConfig("rms_norm"),
        position=ComponentConfig(position),
        causal=True,
    )
    signature = Signature(modality="tokens", output="next_token", seq_len=tokens, vocab_size=BYTES)
    return Architecture(model).graph(signature, mode="step" if step else "forward", max_len=tokens if step else None)


_GLU: Final = ComponentConfig.of("glu", expansion=2.667)
_DECODER: Final = partial(
    _language_model, ComponentConfig.of("softmax_attention", num_heads=8), _GLU, 8, position="rope"
)
_CACHED: Final = 512
RECURRENT: Final[dict[str, Callable[..., Graph]]] = {
    "gla": partial(_language_model, ComponentConfig.of("gated_linear_attention", num_heads=4), _GLU, 6),
    "retnet": partial(_language_model, ComponentConfig.of("retention", num_heads=4), _GLU, 6),
    "mamba": partial(_language_model, ComponentConfig.of("mamba"), ComponentConfig("none"), 6),
}
"""Recurrent language models by name; each takes `tokens`, and `step` for the graph that reads one token."""

MODELS: Final[tuple[SuiteModel, ...]] = (
    *(SuiteModel(f"encoder-t{tokens}", partial(encoder, tokens)) for tokens in (128, 512)),
    *(SuiteModel(f"encoder-t{tokens}-bf16", partial(encoder, tokens), precision="bfloat16") for tokens in (128, 512)),
    SuiteModel("vit-tiny", vit_tiny),
    SuiteModel("decoder-prefill-t512", partial(_DECODER, tokens=512)),
    SuiteModel(
        "decoder-step-512", partial(_DECODER, tokens=_CACHED + 1, step=True), step=True, inputs={"position": _CACHED}
    ),
    SuiteModel("poolformer-s12-stage3", partial(_on_images, 320, 6, _poolformer_block)),
    SuiteModel("convnext-t-stage3", partial(_on_images, 384, 6, _convnext_block)),
    SuiteModel("swin-t-stage3", partial(_on_images, 384, 6, _swin_block)),
    SuiteModel("mixer-s-x8", mixer_small),
    *(
        SuiteModel(f"{name}-t{tokens}", partial(build, tokens=tokens), kind="recurrent")
        for name, build in RECURRENT.items()
        for tokens in (512, 2048)
    ),
    *(
        SuiteModel(f"{name}-step", partial(build, tokens=2048, step=True), kind="recurrent", step=True)
        for name, build in RECURRENT.items()
    ),
)
