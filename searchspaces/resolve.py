"""Turns a model's configuration into components that fit each other, or says why it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ir.component import ChannelMixer, Component, Norm, Position, Reducer, TokenMixer, Transition
from ir.errors import GraphError, SpaceError
from ir.ops.structure import OptionValue
from searchspaces.parts import Block, Conditioner, Head, Stem
from searchspaces.registry import default_registry

if TYPE_CHECKING:
    from searchspaces.architecture import ComponentConfig, LayerConfig, ModelConfig, StageConfig
    from searchspaces.signature import Signature

PartClass = TypeVar("PartClass", bound=Component, covariant=True)
Context = dict[str, OptionValue]


@dataclass(frozen=True)
class Part(Generic[PartClass]):
    """A component with its options, and the registry key that finds its class again."""

    key: str
    component: PartClass


@dataclass(frozen=True)
class LayerModel:
    """The components of one layer; None for the channel mixer or reducer `none`."""

    wiring: Block
    token_mixer: Part[TokenMixer]
    channel_mixer: Part[ChannelMixer] | None
    reducer: Reducer | None


@dataclass(frozen=True)
class StageModel:
    """The components of one stage."""

    d_model: int
    transition: Transition | None
    layers: tuple[LayerModel, ...]


@dataclass(frozen=True)
class ModelParts:
    """The components of a model; no final norm where the last layer ends with one and the model asks for no other.

    The conditioner is None in models without a condition.
    """

    stem: Stem
    position: Position
    norm: Part[Norm]
    final_norm: Part[Norm] | None
    stages: tuple[StageModel, ...]
    head: Head
    conditioner: Conditioner | None


def resolve_model(model: ModelConfig, signature: Signature) -> ModelParts:
    """Make every component of a model.

    Raises:
        InputError: A component is unknown, an option is wrong, or a part fits neither the model nor the signature.
    """
    position = _part(Position, "position", model.position, "position")
    if position.component.options():
        raise SpaceError("token mixers cannot see options of a position", where="position", found=str(model.position))
    stem = _part(Stem, "stem", model.stem_for(signature), "stem").component
    head = _part(Head, "head", model.head_for(signature), "head").component
    for name, problem in (("stem", stem.check(signature)), ("head", head.check(signature))):
        if problem:
            raise SpaceError(f"the {name} does not fit the task", where=name, found=problem)
    stages: list[StageModel] = []
    above = 0
    for index, stage in enumerate(model.stages):
        stages.append(_stage(model, stage, index, above))
        above += len(stage.layers)
    norm = _part(Norm, "norm", model.norm, "norm")
    last = [layer for stage in stages for layer in stage.layers][-1:]
    normed = any(layer.wiring.normalises_output for layer in last)
    final = None if normed else norm
    if model.final_norm is not None:
        final = _part(Norm, "norm", model.final_norm, "final_norm")
    conditioner = _conditioner(model, signature, stages, head)
    return ModelParts(stem, position.component, norm, final, tuple(stages), head, conditioner)


def _conditioner(model: ModelConfig, signature: Signature, stages: list[StageModel], head: Head) -> Conditioner | None:
    """Make the conditioner of a model whose task gives a condition and whose parts read it."""
    layers = [layer for stage in stages for layer in stage.layers]
    readers = [f"layers.{number}.wiring" for number, layer in enumerate(layers) if layer.wiring.conditioned]
    readers += ["head"] if head.conditioned else []
    chosen = model.conditioner_for(signature)
    if signature.condition is None and (chosen or readers):
        raise SpaceError(
            "a part needs a condition, which the task does not give",
            where=(["conditioner"] if chosen else readers)[0],
            expected="a signature with a condition, such as `condition: {timestep: true}`",
            found="none",
            hint="or a part without one, such as the wiring pre_norm or the head {denoiser: {adaptive: false}}",
        )
    if chosen is None:
        return None
    if not readers:
        raise SpaceError(
            "no part of the model reads the condition of the task",
            where="signature.condition",
            expected="a wiring or a head that does, such as ada_ln_zero",
            found=", ".join(dict.fromkeys(layer.wiring.key() for layer in layers)) or "no layers",
        )
    return _part(Conditioner, "conditioner", chosen, "conditioner").component


def _stage(model: ModelConfig, stage: StageConfig, index: int, above: int) -> StageModel:
    """Make a stage; `above` layers come before it."""
    if (stage.transition is None) != (index == 0):
        raise SpaceError(
            "the stem leads to the first stage and a transition to each other one",
            where=f"stages[{index}].transition",
            expected="no transition" if index == 0 else "a transition",
            found=str(stage.transition),
        )
    transition = None
    if stage.transition is not None:
        transition = _part(Transition, "transition", stage.transition, f"stages[{index}].transition").component
    layers = tuple(_layer(model, stage.d_model, layer, above + number) for number, layer in enumerate(stage.layers))
    return StageModel(stage.d_model, transition, layers)


def _layer(model: ModelConfig, d_model: int, layer: LayerConfig, index: int) -> LayerModel:
    where = f"layers.{index}"
    context: Context = {"causal": model.causal, "position": model.position.key, "layer": index + 1}
    mixer = _part(TokenMixer, "token_mixer", layer.token_mixer, f"{where}.mixer", context)
    if model.causal and not mixer.component.is_causal:
        raise SpaceError(
            f"the token mixer {mixer.key} looks ahead, which a decoder must not",
            where=f"{where}.mixer",
            expected="a token mixer that can be causal",
            found=str(layer.token_mixer),
        )
    problem = mixer.component.check(d_model)
    if problem:
        raise SpaceError("the token mixer cannot be built", where=f"{where}.mixer", found=problem)
    channel = reducer = None
    if layer.channel_mixer.key != "none":
        channel = _part(ChannelMixer, "channel_mixer", layer.channel_mixer, f"{where}.channel_mixer", context)
        problem = channel.component.check(d_model)
        if problem:
            raise SpaceError("the channel mixer cannot be built", where=f"{where}.channel_mixer", found=problem)
    if layer.reducer.key != "none":
        reducer = _part(Reducer, "reducer", layer.reducer, f"{where}.reducer", context).component
    wiring = _part(Block, "block", layer.wiring, f"{where}.wiring", context).component
    if reducer is not None and not wiring.reduces:
        raise SpaceError(
            "this wiring has no place for a reducer",
            where=f"{where}.wiring",
            expected="a wiring such as pre_norm",
            found=str(layer.wiring),
        )
    return LayerModel(wiring, mixer, channel, reducer)


def _part(
    cls: type[PartClass], kind: str, config: ComponentConfig, where: str, context: Context | None = None
) -> Part[PartClass]:
    """Make one component; aliases bring their preset options."""
    entry = default_registry().lookup(kind, config.key)
    try:
        component = entry.component.create({**entry.preset, **config.values}, context)
    except GraphError as error:
        place = f"{where}, {error.where}" if error.where else where
        raise SpaceError(
            error.message, where=place, expected=error.expected, found=error.found, hint=error.hint
        ) from error
    if not isinstance(component, cls):
        raise SpaceError(f"not a {kind}", where=where, expected=cls.__name__, found=type(component).__name__)
    return Part(entry.key, component)
