"""A dozen models of different kinds, small enough for an emulator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from ir.graph import Graph
from searchspaces.architecture import Architecture, ComponentConfig, LayerConfig, ModelConfig, StageConfig
from searchspaces.signature import Signature

NONE: Final = ComponentConfig("none")
GLU: Final = ComponentConfig.of("glu", expansion=2.0)
MLP: Final = ComponentConfig.of("mlp", expansion=2.0)
MOE: Final = ComponentConfig.of("mixture_of_experts", num_experts=4, top_k=2, expansion=1.0)
TOKENS: Final = Signature(modality="tokens", output="next_token", seq_len=19, vocab_size=29)
IMAGE: Final = Signature(modality="image", output="class", image_size=16, channels=3, num_classes=5)
SERIES: Final = Signature(modality="tokens", output="class", seq_len=19, vocab_size=29, num_classes=5)


def language_model(
    mixer: ComponentConfig,
    channel_mixer: ComponentConfig,
    *,
    step: bool = False,
    position: str = "none",
    width: int = 24,
    depth: int = 2,
    signature: Signature = TOKENS,
) -> Graph:
    """A decoder of odd sizes; `step` is its streaming form."""
    model = _model(mixer, channel_mixer, width, depth, position, causal=signature.output == "next_token")
    return Architecture(model).graph(signature, mode="step" if step else "forward")


def vision(
    mixer: ComponentConfig,
    channel_mixer: ComponentConfig,
    *,
    stem: ComponentConfig | None = None,
    position: str = "none",
) -> Graph:
    """A classifier of images of 16 x 16 pixels."""
    stem = stem or ComponentConfig.of("image_patches", patch_size=2)
    model = _model(mixer, channel_mixer, 24, 2, position, causal=False, stem=stem)
    return Architecture(model).graph(IMAGE)


def _model(
    mixer: ComponentConfig,
    channel_mixer: ComponentConfig,
    width: int,
    depth: int,
    position: str,
    *,
    causal: bool,
    stem: ComponentConfig | None = None,
) -> ModelConfig:
    layer = LayerConfig(ComponentConfig("pre_norm"), mixer, channel_mixer)
    return ModelConfig(
        stages=(StageConfig(width, (layer,) * depth),),
        norm=ComponentConfig("rms_norm"),
        position=ComponentConfig(position),
        causal=causal,
        stem=stem,
    )


of = ComponentConfig.of
STREAMING: Final[dict[str, Callable[..., Graph]]] = {
    "attention": partial(language_model, of("softmax_attention", num_heads=2), GLU, position="rope"),
    "gla": partial(language_model, of("gated_linear_attention", num_heads=2), MLP),
    "mamba": partial(language_model, of("mamba", state_dim=5), NONE),
    "retention": partial(language_model, of("retention", num_heads=3), GLU),
    "delta_net": partial(language_model, of("delta_net", num_heads=2), NONE),
    "linear_attention": partial(language_model, of("linear_attention", num_heads=2), MLP),
    "experts": partial(language_model, of("hgrn"), MOE),
}
"""Decoders; called with `step=True` they give their streaming form."""

WHOLE: Final[dict[str, Callable[..., Graph]]] = {
    "fft": partial(language_model, of("orchid"), MLP, signature=SERIES),
    "conv": partial(vision, of("depthwise_conv2d", kernel_size=7), MLP),
    "window": partial(vision, of("window_attention", num_heads=2, window=4), MLP),
    "pooling": partial(vision, of("pooling2d"), MLP),
    "tokens_to_token": partial(
        vision,
        of("softmax_attention", num_heads=2),
        MLP,
        stem=of("tokens_to_token", width=8, attention="performer", class_token=False),
        position="sinusoidal",
    ),
}
"""Models that read everything at once."""
