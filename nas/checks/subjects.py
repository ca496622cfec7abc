"""Components built alone: graphs, inputs, parameters and references of whatever a registry holds.

`subjects("token_mixer")` gives a subject for each component of a kind and case it declares; `own_subjects` gives one
for each different part of an architecture, with the options it has there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, ChannelMixer, Component, Norm, Reducer, TokenMixer, Transition
from ir.errors import InputError
from ir.graph import Graph
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.op import Array
from ir.ops.structure import Input
from ir.types import Axes, Axis
from searchspaces.architecture import Architecture, ComponentConfig, brief
from searchspaces.parts import Block, Conditioner, EndCase, Head, LayerParts, Stem
from searchspaces.registry import components, default_registry
from searchspaces.signature import Signature

SCOPE: Final = "part"  # where the component under test puts its parameters
ATTENTION_HEADS: Final = 2  # heads of the weights that a reducer is given
OUTPUT_FACTOR: Final = 2  # a transition leads to so many times the channels


@dataclass(frozen=True)
class Subject:
    """A component with the case that it is built in.

    Attributes:
        name: What reports call it.
        component: The component.
        case: Sizes; the options are the component's already.
        channel: Whether the layer of a wiring has a channel mixer.
    """

    name: str
    component: Component
    case: Case
    channel: bool = True

    @property
    def mixer(self) -> TokenMixer:
        """The component of a token mixer's subject."""
        assert isinstance(self.component, TokenMixer)
        return self.component

    @property
    def end_case(self) -> EndCase:
        """The case of a stem, conditioner or head."""
        assert isinstance(self.case, EndCase)
        return self.case

    def resized(
        self, *, batch: int | None = None, time: int | None = None, grid: tuple[int, int] | None = None
    ) -> Subject:
        """The same component at other sizes; on a grid, `time` tokens make one of so many rows as columns."""
        if time is not None and self.case.grid is not None:
            side = round(time**0.5)
            grid = grid or (side, side)
        case = dataclasses.replace(
            self.case,
            batch=batch or self.case.batch,
            time=time or self.case.time,
            grid=(grid or self.case.grid) if self.case.grid else None,
        )
        return dataclasses.replace(self, case=case)

    def with_form(self, form: str) -> Subject:
        """The same component computed in another form."""
        component: Any = self.component
        return dataclasses.replace(self, component=dataclasses.replace(component, form=form))

    def graph(self) -> Graph:
        """The component as a graph: its input is `x`, its output `y`.

        A reducer may read `weights` too, a block or a head `condition`; a conditioner reads the inputs of its task.
        """
        b = Builder()
        match self.component:
            case TokenMixer() | ChannelMixer() | Norm() as part:
                x = b.input("x", self.case.input_shape)
                with b.scope(SCOPE):
                    y = part.build(b, x)
            case Reducer() as reducer:
                x = b.input("x", self.case.input_shape)
                heads = (self.case.batch, ATTENTION_HEADS, self.case.time, self.case.time)
                weights = b.input("weights", heads) if reducer.needs_attention else None
                with b.scope(SCOPE):
                    y = reducer.build(b, x, weights)
            case Transition() as transition:
                x = b.input("x", self.case.input_shape)
                with b.scope(SCOPE):
                    y = transition.build(b, x, OUTPUT_FACTOR * self.case.d_model)
            case Stem() as stem:
                signature = self.end_case.signature
                x = b.input("x", signature.input_shape(self.case.batch), signature.input_dtype)
                with b.scope(SCOPE):
                    y = stem.build(b, x, self.case.d_model, signature)
            case Head() as head:
                x = b.input("x", (self.case.batch, self.case.time, self.case.d_model))
                condition = self._condition(b) if head.conditioned else None
                self._share(b, head)
                with b.scope(SCOPE):
                    if condition is not None:
                        y = head.build_conditioned(b, x, self.end_case.signature, condition)
                    else:
                        y = head.build(b, x, self.end_case.signature)
            case Conditioner() as conditioner:
                known = self.end_case.signature.condition
                assert known is not None, "the case of a conditioner has a condition"
                types = known.inputs(self.case.batch)
                inputs = {name: b.input(name, kind.shape, kind.dtype) for name, kind in types.items()}
                with b.scope(SCOPE):
                    y = conditioner.build(b, inputs, self.case.d_model, known)
            case Block() as block:
                x = b.input("x", self.case.input_shape)
                y = block.build(x, self._layer(b, self._condition(b) if block.conditioned else None))
            case _:
                raise InputError("a component of this kind is not built alone", where=self.name)
        return b.build(y=y)

    def _share(self, b: Builder, head: Head) -> None:
        for label in head.shared:
            vocab, d_model = Axis("vocab", self.end_case.signature.vocab_size), Axis("d_model", self.case.d_model)
            b.parameter(label, ((vocab,), (d_model,)), "normal(0.02)")

    def _condition(self, b: Builder) -> Tensor:
        return b.input("condition", (self.case.batch, self.case.d_model))

    def _layer(self, b: Builder, condition: Tensor | None) -> LayerParts[Tensor]:
        """Stand-ins for the parts of a layer, each a different function."""

        def norm(name: str, x: Tensor) -> Tensor:
            return b.rms_norm(x, b.parameter(name, ((Axis("d_model", x.shape[-1]),),), "constant(1)"))

        def parameter(name: str, axes: Axes, init: str) -> Tensor:
            return b.parameter(name, axes, init)

        channel = (lambda x: b.square(x) * 0.5) if self.channel else None
        return LayerParts(lambda x: b.tanh(x) * 2.0, channel, norm, parameter, condition=condition)

    def reference(self, params: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
        """The component's own reference, given parameters by their names in the graph."""
        own = {name.removeprefix(f"{SCOPE}."): array for name, array in params.items()}
        if isinstance(self.component, Conditioner):
            return self.component.reference(own, inputs)
        x = inputs["x"]
        match self.component:
            case TokenMixer() | ChannelMixer() | Norm() | Stem() | Transition() as part:
                return part.reference(own, x)
            case Reducer() as reducer:
                return reducer.reference(own, x, inputs.get("weights"))
            case Head() as head if head.conditioned:
                return head.reference_conditioned(own, x, self.end_case.signature, inputs["condition"])
            case Head() as head:
                return head.reference(own, x, self.end_case.signature)
            case Block() as block:
                return block.reference(x, self._layer_reference(params, inputs.get("condition")))
            case _:
                raise InputError("a component of this kind has no reference", where=self.name)

    def _layer_reference(self, params: Mapping[str, Array], condition: Array | None) -> LayerParts[Array]:
        def norm(name: str, x: Array) -> Array:
            return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * params[name]

        channel = (lambda x: 0.5 * x * x) if self.channel else None
        own = LayerParts(lambda x: 2.0 * np.tanh(x), channel, norm, lambda name, axes, init: params[name])
        return dataclasses.replace(own, condition=condition)

    def step_graph(self, max_len: int) -> Graph:
        """One token of a causal mixer: inputs `x`, `position` and the states, outputs `y` and the states."""
        b = Builder()
        x = b.input("x", (self.case.batch, 1, self.case.d_model))
        position = b.input("position", (), "int32")
        types = self.mixer.state(self.case.batch, self.case.d_model, max_len)
        state = {name: b.input(name, kind.shape, kind.dtype) for name, kind in types.items()}
        with b.scope(SCOPE):
            y, after = self.mixer.step(b, x, state, position)
        if {name: tensor.type for name, tensor in after.items()} != types:
            raise InputError("a step returns another state than it declares", where=self.name)
        return b.build(y=y, **after)


def random_params(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Initial values in float64, moved so that no bias is zero and no scale is one; variances stay positive."""
    rng = np.random.default_rng(seed)
    initial = initialize(graph, seed)
    moved = {name: array + 0.2 * rng.standard_normal(array.shape) for name, array in initial.items()}
    return {name: np.abs(array) + 0.5 if name.endswith("_variance") else array for name, array in moved.items()}


def random_inputs(graph: Graph, seed: int = 1) -> dict[str, Array]:
    """Standard normal numbers, or any of 11 tokens or labels, for each input; rows that sum to 1 for `weights`."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for name, node in graph.inputs.items():
        assert isinstance(node.op, Input)
        shape = node.op.type.shape
        if node.op.type.dtype == "int32":
            inputs[name] = rng.integers(0, 11, shape).astype(np.int32)
            continue
        inputs[name] = rng.standard_normal(shape)
        if name == "weights":
            inputs[name] = np.exp(inputs[name]) / np.exp(inputs[name]).sum(axis=-1, keepdims=True)
    return inputs


def run(graph: Graph, params: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
    """The output `y` in float64."""
    return evaluate(graph, inputs, params)["y"]


def zero_state(stream: Graph) -> dict[str, Array]:
    """Where every stream starts."""
    inputs = {name: node for name, node in stream.inputs.items() if name not in ("x", "position")}
    return {name: np.zeros(node.types[0].shape) for name, node in inputs.items()}


def subjects(*kinds: str) -> list[Subject]:
    """A subject for each component of some kinds and each case that it declares."""
    found: list[Subject] = []
    for kind in kinds:
        for key, component in components(kind).items():
            for index, case in enumerate(component.cases):
                built = component.create(case.options)
                if kind == "block":
                    found += [
                        Subject(f"{key}-{index}-{name}", built, case, channel)
                        for name, channel in (("both", True), ("mixer_only", False))
                    ]
                else:
                    found.append(Subject(f"{key}-{index}", built, case))
    return found


def _lessened(signature: Signature) -> Signature:
    """A signature with fewer tokens, labels and classes, which change nothing but the time that a check takes."""
    if signature.condition and signature.condition.num_labels:
        few = dataclasses.replace(signature.condition, num_labels=MOST_CLASSES)
        signature = dataclasses.replace(signature, condition=few)
    if signature.modality != "tokens":
        return dataclasses.replace(signature, num_classes=min(signature.num_classes, MOST_CLASSES))
    sizes = {"seq_len": OWN_TIME, "vocab_size": MOST_CLASSES, "num_classes": MOST_CLASSES}
    return dataclasses.replace(signature, **{name: min(getattr(signature, name), size) for name, size in sizes.items()})


MOST_CLASSES: Final = 24
OWN_TIME: Final = 9
OWN_GRID: Final = (5, 6)
OWN_IMAGES: Final = (32, 48, 56, 64, 96)
"""Sides of images that stems are tried at: in large ones a difference steps over many kinks of a ReLU."""


def _of_few_pixels(signature: Signature, stem: Stem) -> Signature:
    """The signature with the first of the small images that a stem makes more than 3 tokens of."""
    for size in OWN_IMAGES if signature.image_size else ():
        smaller = dataclasses.replace(signature, image_size=size)
        if size < signature.image_size and stem.check(smaller) is None and stem.num_tokens(smaller) > 3:
            return smaller
    return signature


def own_subjects(architecture: Architecture, signature: Signature) -> list[Subject]:
    """A subject for each different part of an architecture, of its own width and few tokens."""
    model = architecture.model
    context = {"causal": model.causal, "position": model.position.key}
    found: dict[tuple[Any, ...], Subject] = {}

    def add(kind: str, config: ComponentConfig | None, d_model: int, layer: int = 1) -> None:
        if config is None or config.key == "none" or (kind, config, d_model) in found:
            return
        entry = default_registry().lookup(kind, config.key)
        component = entry.component.create({**entry.preset, **config.values}, {**context, "layer": layer})
        spatial = bool(getattr(component, "spatial", False)) or kind == "transition"
        case = Case(time=OWN_TIME, d_model=d_model, grid=OWN_GRID if spatial else None)
        if kind in ("stem", "conditioner", "head"):
            own = _lessened(signature)
            own = _of_few_pixels(own, component) if isinstance(component, Stem) else own
            time = component.num_tokens(own) if isinstance(component, Head) else None
            case = EndCase(batch=1, d_model=d_model, time=time or OWN_TIME, signature=own)
        found[kind, config, d_model] = Subject(f"{brief(kind, config)} at width {d_model}", component, case)

    number = 0
    add("stem", model.stem_for(signature), model.stages[0].d_model)
    add("conditioner", model.conditioner_for(signature), model.stages[0].d_model)
    before = model.stages[0].d_model
    for stage in model.stages:
        add("transition", stage.transition, before)
        before = stage.d_model
        for layer in stage.layers:
            number += 1
            add("block", layer.wiring, stage.d_model, number)
            add("token_mixer", layer.token_mixer, stage.d_model, number)
            add("channel_mixer", layer.channel_mixer, stage.d_model, number)
            add("reducer", layer.reducer, stage.d_model, number)
        add("norm", model.norm, stage.d_model)
    add("norm", model.final_norm, before)
    add("head", model.head_for(signature), before)
    return list(found.values())
