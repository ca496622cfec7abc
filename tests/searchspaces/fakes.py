"""Small components for tests of the search-space language; what they compute does not matter."""

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

from ir.builder import Builder, Tensor
from ir.component import ChannelMixer, Component, Norm, Position, Reducer, TokenMixer, context_option, option
from ir.op import Array
from searchspaces.registry import ENTRY_POINT_GROUP, Registry


class _Mixer(TokenMixer):
    def build(self, b: Builder, x: Tensor) -> Tensor:
        return x

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return x


class SoftmaxAttention(_Mixer):
    aliases = {"attention": {}}
    num_heads: int = option(4, minimum=1, maximum=64, doc="Heads.")
    num_kv_heads: int | None = option(None, minimum=1, doc="Heads of keys and values; all by default.")
    window: int = option(0, minimum=0, doc="Tokens seen; 0 for all.")
    qk_norm: bool = option(False, doc="Normalise queries and keys.")
    causal: bool = context_option(True)
    position: str = context_option("none")

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        if self.position == "rope" and d_model // self.num_heads % 2:
            return f"rope needs an even head size, not {d_model // self.num_heads}"
        return None


class GatedLinearAttention(_Mixer):
    aliases = {"gla": {}}
    causality = "causal"
    num_heads: int = option(4, minimum=1, doc="Heads.")
    expand_k: float = option(0.5, minimum=0.1, maximum=4.0, doc="Key width over model width.")

    def check(self, d_model: int) -> str | None:
        if d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        return None


class Pooling(_Mixer):
    window: int = option(3, minimum=1, doc="Tokens pooled.")
    causal: bool = context_option(True)


class Fourier(_Mixer):
    causality = "bidirectional"


class _Channel(ChannelMixer):
    def build(self, b: Builder, x: Tensor) -> Tensor:
        return x

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return x


class Mlp(_Channel):
    expansion: float = option(4.0, minimum=0.25, maximum=16.0, doc="Hidden width over model width.")
    activation: str = option("gelu", choices=("gelu", "relu", "silu"), doc="Nonlinearity.")


class Glu(_Channel):
    aliases = {"swiglu": {"activation": "silu"}, "geglu": {"activation": "gelu"}}
    expansion: float = option(2.667, minimum=0.25, maximum=16.0, doc="Hidden width over model width.")
    activation: str = option("silu", choices=("gelu", "relu", "silu"), doc="Nonlinearity.")


class NoChannelMixer(_Channel):
    pass


class NoReducer(Reducer):
    def build(self, b: Builder, x: Tensor, weights: Tensor | None) -> Tensor:
        return x

    def reference(self, params: Mapping[str, Array], x: Array, weights: Array | None) -> Array:
        return x


class RmsNorm(Norm):
    eps: float = option(1e-5, minimum=0.0, doc="Added to the mean square.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return x

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return x


class LayerNorm(RmsNorm):
    pass


class NoPosition(Position):
    pass


class Rope(Position):
    pass


class PreNorm(Component):
    kind = "block"


class Parallel(Component):
    kind = "block"


class ImagePatches(Component):
    kind = "stem"
    patch_size: int = option(2, minimum=1, doc="Pixels along a side.")


class LanguageModel(Component):
    kind = "head"
    tied: bool = option(False, doc="Share the embedding.")


NAMES = {
    "token_mixer.softmax_attention": "SoftmaxAttention",
    "token_mixer.gated_linear_attention": "GatedLinearAttention",
    "token_mixer.pooling": "Pooling",
    "token_mixer.fourier": "Fourier",
    "channel_mixer.mlp": "Mlp",
    "channel_mixer.glu": "Glu",
    "channel_mixer.none": "NoChannelMixer",
    "reducer.none": "NoReducer",
    "norm.rms_norm": "RmsNorm",
    "norm.layer_norm": "LayerNorm",
    "position.none": "NoPosition",
    "position.rope": "Rope",
    "block.pre_norm": "PreNorm",
    "block.parallel": "Parallel",
    "stem.image_patches": "ImagePatches",
    "head.language_model": "LanguageModel",
}


def registry() -> Registry:
    """Return a registry of the components above and no other."""
    points = tuple(EntryPoint(name, f"{__name__}:{cls}", ENTRY_POINT_GROUP) for name, cls in NAMES.items())
    return Registry(Path(__file__).parent / "no_such_folder", "no_such_package", points)
