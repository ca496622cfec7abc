"""Stages of layers from stem to head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ir.builder import Builder, Tensor
from ir.component import ChannelMixer, Norm, TokenMixer, option
from ir.errors import GraphError, InputError
from ir.types import Axes
from searchspaces.parts import LayerParts, Macro
from searchspaces.resolve import LayerModel, ModelParts, Part, resolve_model

if TYPE_CHECKING:
    from ir.graph import Graph
    from searchspaces.architecture import ModelConfig
    from searchspaces.signature import Signature


class Staged(Macro):
    """One stage makes an isotropic model (Vaswani et al. 2017), several a pyramid (Wang et al. 2021).

    stem -> position -> layers -> [transition -> position -> layers ...] -> norm, unless the last layer ends with one ->
    head. A causal model is a decoder, any other an encoder that sees both ways. Scopes: `stem`, `position`,
    `layers.0.mixer`, `layers.0.channel_mixer`, `layers.0.norm_mixer`, `layers.0.norm_channel`, `layers.0.reducer`,
    `transitions.1`, `positions.1`, `norm`, `head`; layers are numbered through all stages. Side inputs become one
    vector of the first stage's width, scope `condition`, for the wirings and the head that read it.

    With `normalise` the values of each series are moved and scaled on the way in, and the forecast back again: by the
    `last` value alone (Zeng et al. 2023, NLinear), or by mean and deviation of the `instance` (Kim et al. 2022).

    Tokens on the grid of an image stay on it as long as parts need it: spatial mixers and transitions get
    `[B, H, W, D]`, all others a sequence in row order.

    The step graph of a decoder has the inputs `tokens` `[B, 1]`, `position` (int32 scalar) and the states, each named
    like `state.layers.0.mixer.k`; its outputs are `logits` and the new states under the same names. States start as
    zeros.
    """

    paper = (
        "Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762; "
        "Wang et al. 2021, Pyramid Vision Transformer, arXiv 2102.12122"
    )

    normalise: Literal["none", "last", "instance"] = option(
        "none", choices=("none", "last", "instance"), doc="What each variate of a series is made relative to."
    )

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
        self.require_fit(model, signature)
        if batch < 1:
            raise InputError("the batch is not positive", where="batch", found=str(batch))
        if self.normalise != "none" and signature.modality != "series":
            expected = "none, but for forecasts of a series"
            raise InputError("no series to normalise", where="macro.normalise", expected=expected, found=self.normalise)
        parts = resolve_model(model, signature)
        assembly = Assembly(Builder(), parts, signature, expanded or mode != "forward", self)
        if mode == "forward":
            return assembly.forward(batch, _resized(signature, seq_len))
        if not model.causal or signature.output != "next_token":
            raise InputError(
                "only a decoder that predicts the next token can stream",
                where="mode",
                expected="a causal model with output next_token",
                found=f"{'causal' if model.causal else 'bidirectional'}, {signature.output}",
            )
        tokens = 1 if mode == "step" else seq_len or signature.seq_len
        return assembly.step(batch, tokens, max_len or signature.seq_len)

    def require_fit(self, model: ModelConfig, signature: Signature) -> None:
        """Raise an InputError for a model that this macro cannot build; here none."""

    def run_layers(self, assembly: Assembly, x: Tensor, layers: Sequence[NumberedLayer], place: Place) -> Tensor:
        """The layers of one stage, each with its number in the model."""
        for number, layer in layers:
            x, place = assembly.layer(x, number, layer, place), place.after(layer)
        return x


NumberedLayer: TypeAlias = tuple[int, LayerModel]
_LEAST_VARIANCE = 1e-5  # of a series whose values are equal


def _resized(signature: Signature, seq_len: int | None) -> Signature:
    """The signature at another number of input positions."""
    if seq_len is None or seq_len == signature.positions:
        return signature
    if signature.image_size:
        expected = f"{signature.positions}, the pixels of the task's images"
        raise InputError("an image or a video has a fixed size", where="seq_len", expected=expected, found=str(seq_len))
    return dataclasses.replace(signature, seq_len=seq_len)


@dataclass(frozen=True)
class Stream:
    """What a step graph carries.

    Attributes:
        position: Number of the token, at run time.
        max_len: Longest stream.
        states: States by their full names.
        turn: How often the layers have been run before, where a macro repeats them.
    """

    position: Tensor
    max_len: int
    states: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    turn: int = 0


@dataclass(frozen=True)
class Place:
    """Where layers are built: the grid that their tokens lie on, if any, and the stream of a step graph."""

    grid: tuple[int, ...] | None
    stream: Stream | None

    def after(self, layer: LayerModel) -> Place:
        """Where the next layer is: a reducer leaves no grid."""
        return self if layer.reducer is None else Place(None, self.stream)


@dataclass(frozen=True)
class Assembly:
    """One model on its way into one builder.

    Attributes:
        b: Where the nodes go.
        parts: The components.
        signature: The task's, at its own length, which sizes the table of learned positions.
        expanded: Build components out of operations; otherwise norms and mixers become one node each.
        macro: Says in which order the layers run.
        condition: Of each example `[B, D]`, for the parts that read it; None in models without one.
    """

    b: Builder
    parts: ModelParts
    signature: Signature
    expanded: bool
    macro: Staged
    condition: Tensor | None = None

    def forward(self, batch: int, signature: Signature) -> Graph:
        """The graph that reads all positions at once, at the length of another signature."""
        problem = self.parts.stem.check(signature)
        if problem:
            raise InputError("the stem cannot read this length", where="seq_len", found=problem)
        given = self.b.input(signature.input_name, signature.input_shape(batch), signature.input_dtype)
        whole = dataclasses.replace(self, condition=self._condition(batch))
        if self.macro.normalise == "none":
            return self.b.build(**{signature.output_name: whole._model(given, None)})
        shift, scale = self._statistics(given)
        y = whole._model((given - shift) / scale, None) * scale + shift
        return self.b.build(**{signature.output_name: y})

    def _condition(self, batch: int) -> Tensor | None:
        """The side inputs of a batch as one vector for each example."""
        conditioner, condition = self.parts.conditioner, self.signature.condition
        if conditioner is None or condition is None:
            return None
        types = condition.inputs(batch)
        inputs = {name: self.b.input(name, kind.shape, kind.dtype) for name, kind in types.items()}
        with self.b.scope("condition"):
            return conditioner.build(self.b, inputs, self.parts.stages[0].d_model, condition)

    def _statistics(self, series: Tensor) -> tuple[Tensor, Tensor | float]:
        """What each variate of `[B, T, C]` is made relative to, `[B, 1, C]`, and the unit that it is measured in."""
        b = self.b
        if self.macro.normalise == "last":
            return b.slice(series, 1, series.shape[1] - 1, series.shape[1]), 1.0
        shift = b.mean(series, 1, keepdims=True)
        return shift, b.sqrt(b.mean(b.square(series - shift), 1, keepdims=True) + _LEAST_VARIANCE)

    def step(self, batch: int, length: int, max_len: int) -> Graph:
        """The graph that reads some tokens, one or more, and the state before them."""
        tokens = self.b.input("tokens", (batch, length), "int32")
        stream = Stream(self.b.input("position", (), "int32"), max_len)
        logits = self._model(tokens, stream)
        return self.b.build(**{self.signature.output_name: logits}, **stream.states)

    def _model(self, given: Tensor, stream: Stream | None) -> Tensor:
        parts, b = self.parts, self.b
        with b.scope("stem"):
            x = parts.stem.build(b, given, parts.stages[0].d_model, self.signature)
        known = parts.stem.num_tokens(self.signature)
        grid = x.shape[1:3] if x.type.rank == 4 else parts.stem.grid(self.signature)
        number = 0
        for index, stage in enumerate(parts.stages):
            if stage.transition is not None:
                x = self._on_grid(x, grid, f"stages[{index}].transition")
                with b.scope(f"transitions.{index}"):
                    x = stage.transition.build(b, x, stage.d_model)
                on_grid = x.type.rank == 4  # a transition to a class token leaves the plane
                grid, known = (x.shape[1:3], x.shape[1] * x.shape[2]) if on_grid else (None, x.shape[1])
            x = self._embed("position" if index == 0 else f"positions.{index}", x, known, stream)
            layers = list(enumerate(stage.layers, number))
            x = self.macro.run_layers(self, x, layers, Place(grid, stream))
            grid = None if any(layer.reducer for layer in stage.layers) else grid
            number += len(layers)
        if parts.final_norm is not None:
            x = self._norm("norm", parts.final_norm, x)
        with b.scope("head"):
            if self.condition is not None:
                return parts.head.build_conditioned(b, self._sequence(x), self.signature, self.condition)
            return parts.head.build(b, self._sequence(x), self.signature)

    def layer(self, x: Tensor, number: int, layer: LayerModel, place: Place) -> Tensor:
        """One layer of x."""
        with self.b.scope(f"layers.{number}"):
            return layer.wiring.build(x, self._layer(layer, place.grid, place.stream))

    def _embed(self, scope: str, x: Tensor, known: int, stream: Stream | None) -> Tensor:
        position = self.parts.position
        shape, x = x.shape, self._sequence(x)
        wanted = stream.max_len if stream else x.shape[1]
        if position.bounded and wanted > known:
            raise InputError(
                f"position {position.key()} ends before the sequence does",
                where="position",
                expected=f"at most {known} tokens, the task's own length",
                found=f"{wanted} tokens",
                hint="other positions, such as rope, have no end",
            )
        with self.b.scope(scope):
            return self._shaped(position.embed(self.b, x, known, stream.position if stream else None), shape)

    def _layer(self, layer: LayerModel, grid: tuple[int, ...] | None, stream: Stream | None) -> LayerParts[Tensor]:
        """The layer's parts as functions that add nodes under their names."""
        mixer, channel_mixer, reducer = layer.token_mixer, layer.channel_mixer, layer.reducer
        weights: list[Tensor] = []

        def mix(x: Tensor) -> Tensor:
            with self.b.scope("mixer"):
                if stream is not None:
                    return self._step(mixer.component, x, stream)
                if reducer is not None and reducer.needs_attention:
                    y, attention = mixer.component.build_with_weights(self.b, self._sequence(x))
                    weights.append(attention)
                    return self._shaped(y, x.shape)
                return self._place("token_mixer", mixer, x, grid)

        def channel(x: Tensor) -> Tensor:
            assert channel_mixer is not None
            with self.b.scope("channel_mixer"):
                if channel_mixer.component.spatial:
                    return self._place("channel_mixer", channel_mixer, x, grid)
                return self._call("channel_mixer", channel_mixer, x)

        def reduce(x: Tensor) -> Tensor:
            if reducer is None:
                return x
            with self.b.scope("reducer"):
                return reducer.build(self.b, self._sequence(x), weights[0] if weights else None)

        def parameter(name: str, axes: Axes, init: str) -> Tensor:
            return self.b.parameter(name, axes, init)

        def norm(name: str, x: Tensor) -> Tensor:
            return self._norm(name, self.parts.norm, x)

        return LayerParts(mix, channel if channel_mixer else None, norm, parameter, reduce, self.condition)

    def _place(
        self, kind: str, part: Part[TokenMixer] | Part[ChannelMixer], x: Tensor, grid: tuple[int, ...] | None
    ) -> Tensor:
        """A mixer on tokens laid out as it needs them; the result is laid out like x."""
        component: Any = part.component
        if kind == "channel_mixer" or component.spatial:
            placed = self._on_grid(x, grid, f"{self.b.scope_path}, {part.key}")
        else:
            placed = self._sequence(x)
        problem = component.check_tokens(placed.shape[1:-1]) if kind == "token_mixer" else None
        if problem:
            raise InputError("the token mixer cannot mix these tokens", where=self.b.scope_path, found=problem)
        return self._shaped(self._call(kind, part, placed), x.shape)

    def _sequence(self, x: Tensor) -> Tensor:
        """`[B, T, D]`, tokens of a grid in row order."""
        return x if x.type.rank == 3 else self.b.reshape(x, x.shape[0], x.shape[1] * x.shape[2], x.shape[3])

    def _on_grid(self, x: Tensor, grid: tuple[int, ...] | None, where: str) -> Tensor:
        """`[B, H, W, D]`."""
        if x.type.rank == 4:
            return x
        if grid is None:
            raise InputError(
                "a part needs tokens on the grid of an image",
                where=where,
                expected="a stem that makes a grid, and no reducer or class token before",
                found=f"{x.shape[1]} tokens in a row",
                hint="use a part that mixes sequences, or another stem",
            )
        return self.b.reshape(x, x.shape[0], *grid, x.shape[2])

    def _shaped(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x if x.shape == shape else self.b.reshape(x, *shape)

    def _norm(self, name: str, norm: Part[Norm], x: Tensor) -> Tensor:
        with self.b.scope(name):
            return self._call("norm", norm, x)

    def _call(self, kind: str, part: Part[TokenMixer] | Part[ChannelMixer] | Part[Norm], x: Tensor) -> Tensor:
        if self.expanded:
            return part.component.build(self.b, x)
        return self.b.component(kind, part.key, part.component.options(), x)

    def _step(self, mixer: TokenMixer, x: Tensor, stream: Stream) -> Tensor:
        """One token of a mixer; its states become inputs, and outputs of the same names."""
        types = mixer.state(x.shape[0], x.shape[-1], stream.max_len)
        turn = f".turn{stream.turn}" if stream.turn else ""
        names = {name: f"state.{self.b.scope_path}{turn}.{name}" for name in types}
        state = {name: self.b.input(names[name], kind.shape, kind.dtype) for name, kind in types.items()}
        y, after = mixer.step(self.b, x, state, stream.position)
        if {name: tensor.type for name, tensor in after.items()} != types:
            raise GraphError("a step returns another state than it declares", where=self.b.scope_path)
        stream.states.update({names[name]: after[name] for name in types})
        return y
