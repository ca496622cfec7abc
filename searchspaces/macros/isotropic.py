"""Equal layers from end to end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ir.builder import Builder, Tensor
from ir.component import ChannelMixer, Norm, TokenMixer
from ir.errors import GraphError, InputError
from searchspaces.parts import LayerParts, Macro
from searchspaces.resolve import LayerModel, ModelParts, Part, resolve_model

if TYPE_CHECKING:
    from ir.graph import Graph
    from searchspaces.architecture import ModelConfig
    from searchspaces.signature import Signature


class Isotropic(Macro):
    """One width and one number of tokens from end to end (Vaswani et al. 2017).

    stem -> position -> layers -> norm, unless the last layer ends with one -> head. A causal model is a decoder, any
    other an encoder that sees both ways. Scopes: `stem`, `position`, `layers.0.mixer`, `layers.0.channel_mixer`,
    `layers.0.norm_mixer`, `layers.0.norm_channel`, `norm`, `head`.

    The step graph of a decoder has the inputs `tokens` `[B, 1]`, `position` (int32 scalar) and the states, each named
    like `state.layers.0.mixer.k`; its outputs are `logits` and the new states under the same names. States start as
    zeros.
    """

    paper = "Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762"

    def build_model(
        self,
        model: ModelConfig,
        signature: Signature,
        *,
        batch: int = 1,
        seq_len: int | None = None,
        mode: Literal["forward", "step"] = "forward",
        max_len: int | None = None,
        expanded: bool = True,
    ) -> Graph:
        if batch < 1:
            raise InputError("the batch is not positive", where="batch", found=str(batch))
        parts = resolve_model(model, signature)
        assembly = _Assembly(Builder(), parts, model.d_model, signature, expanded or mode == "step")
        if mode == "forward":
            return assembly.forward(batch, _resized(signature, seq_len))
        if not model.causal or signature.output != "next_token":
            raise InputError(
                "only a decoder that predicts the next token can stream",
                where="mode",
                expected="a causal model with output next_token",
                found=f"{'causal' if model.causal else 'bidirectional'}, {signature.output}",
            )
        return assembly.step(batch, max_len or signature.seq_len)


def _resized(signature: Signature, seq_len: int | None) -> Signature:
    """The signature at another number of input positions."""
    if seq_len is None or seq_len == signature.positions:
        return signature
    if signature.modality == "image":
        expected = f"{signature.positions}, the pixels of the task's images"
        raise InputError("an image has a fixed size", where="seq_len", expected=expected, found=str(seq_len))
    return dataclasses.replace(signature, seq_len=seq_len)


@dataclass(frozen=True)
class _Stream:
    """What a step graph carries: the run-time position, the longest stream, and the states by full name."""

    position: Tensor
    max_len: int
    states: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class _Assembly:
    """One model on its way into one builder.

    Attributes:
        b: Where the nodes go.
        parts: The components.
        d_model: Width.
        signature: The task's, at its own length, which sizes the table of learned positions.
        expanded: Build components out of operations; otherwise norms and mixers become one node each.
    """

    b: Builder
    parts: ModelParts
    d_model: int
    signature: Signature
    expanded: bool

    def forward(self, batch: int, signature: Signature) -> Graph:
        """The graph that reads all positions at once, at the length of another signature."""
        problem = self.parts.stem.check(signature)
        if problem:
            raise InputError("the stem cannot read this length", where="seq_len", found=problem)
        given = self.b.input(signature.input_name, signature.input_shape(batch), signature.input_dtype)
        return self.b.build(**{signature.output_name: self._model(given, None)})

    def step(self, batch: int, max_len: int) -> Graph:
        """The graph that reads one token and the state before it."""
        tokens = self.b.input("tokens", (batch, 1), "int32")
        stream = _Stream(self.b.input("position", (), "int32"), max_len)
        logits = self._model(tokens, stream)
        return self.b.build(**{self.signature.output_name: logits}, **stream.states)

    def _model(self, given: Tensor, stream: _Stream | None) -> Tensor:
        parts, b = self.parts, self.b
        with b.scope("stem"):
            x = parts.stem.build(b, given, self.d_model, self.signature)
        x = self._embed(x, stream)
        for index, layer in enumerate(parts.layers):
            with b.scope(f"layers.{index}"):
                x = layer.wiring.build(x, self._layer(layer, stream))
        if not parts.layers[-1].wiring.normalises_output:
            x = self._norm("norm", x)
        with b.scope("head"):
            return parts.head.build(b, x, self.signature)

    def _embed(self, x: Tensor, stream: _Stream | None) -> Tensor:
        position, known = self.parts.position, self.parts.stem.num_tokens(self.signature)
        wanted = stream.max_len if stream else x.shape[1]
        if position.bounded and wanted > known:
            raise InputError(
                f"position {position.key()} ends before the sequence does",
                where="position",
                expected=f"at most {known} tokens, the task's own length",
                found=f"{wanted} tokens",
                hint="other positions, such as rope, have no end",
            )
        with self.b.scope("position"):
            return position.embed(self.b, x, known, stream.position if stream else None)

    def _layer(self, layer: LayerModel, stream: _Stream | None) -> LayerParts[Tensor]:
        """The layer's parts as functions that add nodes under their names."""
        mixer, channel_mixer = layer.token_mixer, layer.channel_mixer

        def mix(x: Tensor) -> Tensor:
            with self.b.scope("mixer"):
                return self._call("token_mixer", mixer, x) if stream is None else self._step(mixer.component, x, stream)

        def channel(x: Tensor) -> Tensor:
            assert channel_mixer is not None
            with self.b.scope("channel_mixer"):
                return self._call("channel_mixer", channel_mixer, x)

        return LayerParts(mix, channel if channel_mixer else None, self._norm)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        with self.b.scope(name):
            return self._call("norm", self.parts.norm, x)

    def _call(self, kind: str, part: Part[TokenMixer] | Part[ChannelMixer] | Part[Norm], x: Tensor) -> Tensor:
        if self.expanded:
            return part.component.build(self.b, x)
        return self.b.component(kind, part.key, part.component.options(), x)

    def _step(self, mixer: TokenMixer, x: Tensor, stream: _Stream) -> Tensor:
        """One token of a mixer; its states become inputs, and outputs of the same names."""
        types = mixer.state(x.shape[0], self.d_model, stream.max_len)
        names = {name: f"state.{self.b.scope_path}.{name}" for name in types}
        state = {name: self.b.input(names[name], kind.shape, kind.dtype) for name, kind in types.items()}
        y, after = mixer.step(self.b, x, state, stream.position)
        if {name: tensor.type for name, tensor in after.items()} != types:
            raise GraphError("a step returns another state than it declares", where=self.b.scope_path)
        stream.states.update({names[name]: after[name] for name in types})
        return y
