"""Two streams of tokens: patches, and the words that each patch is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ir.builder import Builder, Tensor
from ir.component import ChannelMixer, Norm, TokenMixer, option
from ir.errors import InputError
from ir.types import Axes, Axis
from searchspaces import registry
from searchspaces.parts import LayerParts, Macro
from searchspaces.resolve import LayerModel, ModelParts, Part, resolve_model

if TYPE_CHECKING:
    from ir.graph import Graph
    from searchspaces.architecture import ModelConfig
    from searchspaces.signature import Signature


class Tnt(Macro):
    """Transformer in transformer (Han et al. 2021): an image's patches are sentences, parts of a patch their words.

    The stem makes the words Y_i `[m, c]` of each patch i by itself, plus a learned position of each word;
    Z = [class token, merge(Y)] plus the position, merge(Y) = norm(W norm(vec(Y_i))) `[B, N, D]`. Each layer is
    Y = layer_words(Y), over the words of one patch; Z_i = Z_i + merge(Y_i); Z = layer(Z), over the patches. The head
    gets Z. Both layers have the wiring, norm and channel mixer of the space; `words_mixer` mixes words,
    with biases if it can have them.

    Scopes: `stem`, `merge`, `position`, `layers.0.words`, `layers.0.merge`, and in `layers.0` as in a model of one
    stage. Costs N m^2 and N^2.
    """

    paper = "Han et al. 2021, Transformer in Transformer, arXiv 2103.00112"

    patch_size: int = option(16, minimum=1, maximum=1024, doc="Height and width of a patch, pixels.")
    words_dim: int = option(24, minimum=1, maximum=4096, doc="Width of a word.")
    words_heads: int = option(4, minimum=1, maximum=1024, doc="Heads of the words' mixer, if it has any.")
    words_mixer: str = option("softmax_attention", doc="Token mixer of the words.")

    def build_model(
        self,
        model: ModelConfig,
        signature: Signature,
        *,
        batch: int = 1,
        seq_len: int | None = None,
        mode: Literal["forward", "step", "prefill"] = "forward",
        max_len: int | None = None,
        expanded: bool = True,
    ) -> Graph:
        if mode != "forward" or signature.modality != "image" or len(model.stages) != 1 or signature.condition:
            expected = "images, one stage, no streaming and no condition"
            raise InputError("the macro tnt cannot build this model", where="macro", expected=expected)
        if batch < 1 or seq_len not in (None, signature.positions):
            raise InputError("an image has a fixed size, and a batch an image", where="seq_len", found=str(seq_len))
        if signature.image_size % self.patch_size:
            expected = f"a divisor of the image size {signature.image_size}"
            raise InputError(
                "patches do not fill the image", where="macro.patch_size", expected=expected, found=str(self.patch_size)
            )
        b, parts = Builder(), resolve_model(model, signature)
        given = b.input(signature.input_name, signature.input_shape(batch), signature.input_dtype)
        logits = _Assembly(b, parts, expanded, self._mixer()).model(given, signature, self)
        return b.build(**{signature.output_name: logits})

    def _mixer(self) -> Part[TokenMixer]:
        found = registry.get("token_mixer", self.words_mixer)
        own = {"num_heads": self.words_heads, "bias": True, "causal": False}
        mixer = found.create({name: value for name, value in own.items() if name in found.option_specs()})
        assert isinstance(mixer, TokenMixer)
        if mixer.is_causal or mixer.spatial or mixer.check(self.words_dim):
            problem = mixer.check(self.words_dim) or "it is causal or mixes over the plane"
            raise InputError("this token mixer cannot mix words", where="macro.words_mixer", found=problem)
        return Part(mixer.key(), mixer)


@dataclass(frozen=True)
class _Assembly:
    """One model on its way into one builder; components stay single nodes unless `expanded`."""

    b: Builder
    parts: ModelParts
    expanded: bool
    words_mixer: Part[TokenMixer]

    def model(self, image: Tensor, signature: Signature, macro: Tnt) -> Tensor:
        b, parts, stage = self.b, self.parts, self.parts.stages[0]
        words = self._words(image, signature, macro)
        sentences = self._first_sentences(words, image.shape[0], stage.d_model)
        with b.scope("position"):
            sentences = parts.position.embed(b, sentences, sentences.shape[1])
        for number, layer in enumerate(stage.layers):
            with b.scope(f"layers.{number}"):
                with b.scope("words"):
                    words = layer.wiring.build(words, self._layer(layer, self.words_mixer))
                with b.scope("merge"):
                    merged = self._merge(words, image.shape[0], stage.d_model, bias=False)
                sentences = sentences + b.pad(merged, 1, 1, 0)  # the class token has no words
                sentences = layer.wiring.build(sentences, self._layer(layer, layer.token_mixer))
        if parts.final_norm is not None:
            with b.scope("norm"):
                sentences = self._call("norm", parts.final_norm, sentences)
        with b.scope("head"):
            return parts.head.build(b, sentences, signature)

    def _words(self, image: Tensor, signature: Signature, macro: Tnt) -> Tensor:
        """The words `[B * N, m, c]` of all patches, their positions added."""
        b, size = self.b, macro.patch_size
        batch, height, width, channels = image.shape
        tiles = b.reshape(image, batch, height // size, size, width // size, size, channels)
        patches = b.reshape(b.transpose(tiles, 0, 1, 3, 2, 4, 5), -1, size, size, channels)
        with b.scope("stem"):
            words = self.parts.stem.build(
                b, patches, macro.words_dim, dataclasses.replace(signature, image_size=macro.patch_size)
            )
            words = b.reshape(words, patches.shape[0], -1, macro.words_dim)
            axes = ((Axis("words", words.shape[1]),), (Axis("words_dim", macro.words_dim),))
            return words + b.parameter("word_position", axes, "normal(0.02)")

    def _first_sentences(self, words: Tensor, batch: int, d_model: int) -> Tensor:
        b = self.b
        with b.scope("merge"):
            merged = self._merge(words, batch, d_model, bias=True)
            first = b.parameter("class_token", ((Axis("d_model", d_model),),), "normal(0.02)")
        return b.concat(1, b.broadcast(b.reshape(first, 1, 1, d_model), batch, 1, d_model), merged)

    def _merge(self, words: Tensor, batch: int, d_model: int, *, bias: bool) -> Tensor:
        """One vector `[B, N, D]` of the words of each patch."""
        b, norm = self.b, self.parts.norm
        together = b.reshape(words, batch, words.shape[0] // batch, words.shape[1] * words.shape[2])
        with b.scope("norm_words"):
            together = self._call("norm", norm, together)
        merged = b.linear(together, "weight", (Axis("d_model", d_model),), bias=bias)
        with b.scope("norm"):
            return self._call("norm", norm, merged)

    def _layer(self, layer: LayerModel, mixer: Part[TokenMixer]) -> LayerParts[Tensor]:
        """The layer's parts, around another token mixer, as functions that add nodes under their names."""

        def parameter(name: str, axes: Axes, init: str) -> Tensor:
            return self.b.parameter(name, axes, init)

        def norm(name: str, x: Tensor) -> Tensor:
            return self._scoped(name, "norm", self.parts.norm)(x)

        channel = layer.channel_mixer
        mix = self._scoped("mixer", "token_mixer", mixer)
        return LayerParts(
            mix, self._scoped("channel_mixer", "channel_mixer", channel) if channel else None, norm, parameter
        )

    def _scoped(
        self, scope: str, kind: str, part: Part[TokenMixer] | Part[ChannelMixer] | Part[Norm]
    ) -> Callable[[Tensor], Tensor]:
        def build(x: Tensor) -> Tensor:
            with self.b.scope(scope):
                return self._call(kind, part, x)

        return build

    def _call(self, kind: str, part: Part[TokenMixer] | Part[ChannelMixer] | Part[Norm], x: Tensor) -> Tensor:
        if self.expanded:
            return part.component.build(self.b, x)
        return self.b.component(kind, part.key, part.component.options(), x)
