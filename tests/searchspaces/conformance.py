"""Builds components alone, for the tests that every component of the registry has to pass.

`MIXERS`, `TOKENWISE`, `ENDS` and `BLOCKS` hold a subject for each component and case; `@each(MIXERS)` runs a test, with
the argument `subject`, on all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ir.builder import Builder, Tensor
from ir.component import Case, ChannelMixer, Component, Norm, TokenMixer
from ir.graph import Graph
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.op import Array
from ir.ops.structure import Input
from ir.types import Axis
from searchspaces import registry
from searchspaces.parts import Block, EndCase, Head, LayerParts, Stem

SCOPE = "part"  # where the component under test puts its parameters


@dataclass(frozen=True)
class Subject:
    """A component with the case that it is built in."""

    name: str
    component: Component
    case: Case

    @property
    def mixer(self) -> TokenMixer:
        """The component of a token mixer's subject."""
        assert isinstance(self.component, TokenMixer)
        return self.component

    def resized(self, *, batch: int | None = None, time: int | None = None) -> Subject:
        """The same component at other sizes."""
        case = dataclasses.replace(self.case, batch=batch or self.case.batch, time=time or self.case.time)
        return dataclasses.replace(self, case=case)

    def with_form(self, form: str) -> Subject:
        """The same component computed in another form."""
        component: Any = self.component
        return dataclasses.replace(self, component=dataclasses.replace(component, form=form))

    def graph(self) -> Graph:
        """The component as a graph: its input is `x`, its output `y`."""
        b = Builder()
        match self.component:
            case TokenMixer() | ChannelMixer() | Norm() as mixer:
                x = b.input("x", (self.case.batch, self.case.time, self.case.d_model))
                with b.scope(SCOPE):
                    y = mixer.build(b, x)
            case Stem() as stem:
                signature = self.end_case.signature
                x = b.input("x", signature.input_shape(self.case.batch), signature.input_dtype)
                with b.scope(SCOPE):
                    y = stem.build(b, x, self.case.d_model, signature)
            case Head() as head:
                x = b.input("x", (self.case.batch, self.case.time, self.case.d_model))
                self._share(b, head)
                with b.scope(SCOPE):
                    y = head.build(b, x, self.end_case.signature)
            case Block() as block:
                x = b.input("x", (self.case.batch, self.case.time, self.case.d_model))
                y = block.build(x, self._layer(b))
            case _:
                raise TypeError(self.name)
        return b.build(y=y)

    @property
    def end_case(self) -> EndCase:
        """The case of a stem or head."""
        assert isinstance(self.case, EndCase)
        return self.case

    def _share(self, b: Builder, head: Head) -> None:
        for label in head.shared:
            vocab, d_model = Axis("vocab", self.end_case.signature.vocab_size), Axis("d_model", self.case.d_model)
            b.parameter(label, ((vocab,), (d_model,)), "normal(0.02)")

    def _layer(self, b: Builder) -> LayerParts[Tensor]:
        """Stand-ins for the parts of a layer, each a different function."""

        def norm(name: str, x: Tensor) -> Tensor:
            return b.rms_norm(x, b.parameter(name, ((Axis("d_model", x.shape[-1]),),), "constant(1)"))

        channel = (lambda x: b.square(x) * 0.5) if self.case.options["channel"] else None
        return LayerParts(lambda x: b.tanh(x) * 2.0, channel, norm)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        """The component's own reference, given parameters by their names in the graph."""
        own = {name.removeprefix(f"{SCOPE}."): array for name, array in params.items()}
        match self.component:
            case TokenMixer() | ChannelMixer() | Norm() | Stem() as part:
                return part.reference(own, x)
            case Head() as head:
                return head.reference(own, x, self.end_case.signature)
            case Block() as block:
                return block.reference(x, self._layer_reference(params))
            case _:
                raise TypeError(self.name)

    def _layer_reference(self, params: Mapping[str, Array]) -> LayerParts[Array]:
        def norm(name: str, x: Array) -> Array:
            return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * params[name]

        channel = (lambda x: 0.5 * x * x) if self.case.options["channel"] else None
        return LayerParts(lambda x: 2.0 * np.tanh(x), channel, norm)

    def step_graph(self, max_len: int) -> Graph:
        """One token of a causal mixer: inputs `x`, `position` and the states, outputs `y` and the states."""
        b = Builder()
        x = b.input("x", (self.case.batch, 1, self.case.d_model))
        position = b.input("position", (), "int32")
        types = self.mixer.state(self.case.batch, self.case.d_model, max_len)
        state = {name: b.input(name, kind.shape, kind.dtype) for name, kind in types.items()}
        with b.scope(SCOPE):
            y, after = self.mixer.step(b, x, state, position)
        assert {name: tensor.type for name, tensor in after.items()} == types
        return b.build(y=y, **after)


def random_params(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Initial values in float64, moved so that no bias is zero and no scale is one."""
    rng = np.random.default_rng(seed)
    initial = initialize(graph, seed)
    return {name: array + 0.2 * rng.standard_normal(array.shape) for name, array in initial.items()}


def random_input(graph: Graph, seed: int = 1) -> Array:
    """Standard normal numbers, or any of 11 tokens, for the input `x`."""
    op = graph.inputs["x"].op
    assert isinstance(op, Input)
    rng = np.random.default_rng(seed)
    if op.type.dtype == "int32":
        return rng.integers(0, 11, op.type.shape).astype(np.int32)
    return rng.standard_normal(op.type.shape)


def run(graph: Graph, params: Mapping[str, Array], x: Array) -> Array:
    """The output `y` in float64."""
    return evaluate(graph, {"x": x}, params)["y"]


def zero_state(stream: Graph) -> dict[str, Array]:
    """Where every stream starts."""
    inputs = {name: node for name, node in stream.inputs.items() if name not in ("x", "position")}
    return {name: np.zeros(node.types[0].shape) for name, node in inputs.items()}


def each(subjects: list[Subject]) -> pytest.MarkDecorator:
    """Run a test on every subject."""
    return pytest.mark.parametrize("subject", subjects, ids=[subject.name for subject in subjects])


def _subjects(*kinds: str) -> list[Subject]:
    return [
        Subject(f"{key}-{index}", component.create(case.options), case)
        for kind in kinds
        for key, component in registry.components(kind).items()
        for index, case in enumerate(component.cases)
    ]


def _blocks() -> list[Subject]:
    return [
        Subject(f"{key}-{name}", block(), Case({"channel": channel}))
        for key, block in registry.components("block").items()
        for name, channel in (("both", True), ("mixer_only", False))
    ]


MIXERS = _subjects("token_mixer")
CAUSAL = [subject for subject in MIXERS if subject.mixer.is_causal]
LOOKING_BOTH_WAYS = [subject for subject in MIXERS if not subject.mixer.is_causal]
WITH_FORMS = [subject for subject in MIXERS if subject.mixer.forms]
TOKENWISE = _subjects("channel_mixer", "norm")
ENDS = _subjects("stem", "head")
BLOCKS = _blocks()
EVERYTHING = [*MIXERS, *TOKENWISE, *ENDS, *BLOCKS]
