"""Turns a model's configuration into components that fit each other, or says why it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ir.component import ChannelMixer, Component, Norm, Position, TokenMixer
from ir.errors import GraphError, SpaceError
from ir.ops.structure import OptionValue
from searchspaces.parts import Block, Head, Stem
from searchspaces.registry import default_registry

if TYPE_CHECKING:
    from searchspaces.architecture import ComponentConfig, LayerConfig, ModelConfig
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
    """The components of one layer; no channel mixer where the configuration says `none`."""

    wiring: Block
    token_mixer: Part[TokenMixer]
    channel_mixer: Part[ChannelMixer] | None


@dataclass(frozen=True)
class ModelParts:
    """The components of a model."""

    stem: Stem
    position: Position
    norm: Part[Norm]
    layers: tuple[LayerModel, ...]
    head: Head


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
    layers = tuple(_layer(model, layer, f"layers.{index}") for index, layer in enumerate(model.layers))
    return ModelParts(stem, position.component, _part(Norm, "norm", model.norm, "norm"), layers, head)


def _layer(model: ModelConfig, layer: LayerConfig, where: str) -> LayerModel:
    context: Context = {"causal": model.causal, "position": model.position.key}
    mixer = _part(TokenMixer, "token_mixer", layer.token_mixer, f"{where}.mixer", context)
    if model.causal and not mixer.component.is_causal:
        raise SpaceError(
            f"the token mixer {mixer.key} looks ahead, which a decoder must not",
            where=f"{where}.mixer",
            expected="a token mixer that can be causal",
            found=str(layer.token_mixer),
        )
    problem = mixer.component.check(model.d_model)
    if problem:
        raise SpaceError("the token mixer cannot be built", where=f"{where}.mixer", found=problem)
    absent = layer.channel_mixer.key == "none"
    channel = None if absent else _part(ChannelMixer, "channel_mixer", layer.channel_mixer, f"{where}.channel_mixer")
    return LayerModel(_part(Block, "block", layer.wiring, f"{where}.wiring").component, mixer, channel)


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
