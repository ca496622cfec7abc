"""Where the parameters of every architecture of a space lie in one set of arrays.

A parameter of a model is a part, along each of its axes, of an array as large as any architecture needs: the leading
one of heads or channels, the latest taps of a causal convolution, the middle ones of a centred one.
The projections that token mixers have in common (queries, keys, values, gate, output) are one array for all kinds of
mixer in a layer; everything else belongs to its layer and the component that declares it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from ir.errors import InputError
from ir.graph import Graph
from ir.initializers import FloatArray, Params, draw
from ir.ops.structure import Parameter
from ir.types import Axes, Axis, axes_shape
from searchspaces.architecture import Architecture, ComponentConfig, ModelConfig
from searchspaces.convolutions import AROUND, PAST
from searchspaces.signature import Signature

HomeOf: TypeAlias = Callable[[str], tuple[str, str]]
"""The place and the component that a parameter belongs to, by the parameter's full name."""

ELASTIC: Final = frozenset(
    {"agents", "channels", "d_model", "experts", "features", "gate", "head_dim", "heads", "hidden", "mark", "order"}
    | {"parameter_tokens", "power", "rank", "share", "squeeze", "state", "words_dim"}
)
"""Axes along which a smaller model takes the leading part. Along all others place has a meaning: each size has an array
of its own, but for the taps of convolutions."""
_SHARED_AXES: Final = ELASTIC | {PAST, AROUND}

_SAME_AXIS: Final = {"kv_heads": "heads", "key_dim": "head_dim", "value_dim": "head_dim"}
_INWARDS: Final = "d_model,heads*head_dim"
_SHARED: Final = {
    **dict.fromkeys(("q", "k", "v", "gate", "output_gate"), _INWARDS),
    "out": "heads*head_dim,d_model",
}
"""Parameters of token mixers that all kinds share, where their axes are these."""


@dataclass(frozen=True)
class Slot:
    """One array of the store.

    Attributes:
        key: Its name.
        label: Name of the parameter in a model; decides whether weight decay applies.
        axes: Axes at their largest sizes.
        init: Initial distribution.
        trained: Whether gradients change it.
    """

    key: str
    label: str
    axes: Axes
    init: str
    trained: bool

    def joined(self, other: Slot) -> Slot:
        """Return the slot that holds both, with the initial distribution of the larger one."""
        pairs = zip(self.axes, other.axes, strict=True)
        axes = tuple(tuple(map(_larger, ours, theirs)) for ours, theirs in pairs)
        init = other.init if math.prod(axes_shape(other.axes)) > math.prod(axes_shape(self.axes)) else self.init
        return Slot(self.key, self.label, axes, init, self.trained)


class ParameterStore:
    """The arrays that hold the parameters of many models.

    Args:
        slots: What the models declare; those of one key become one array.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots: dict[str, Slot] = {}
        for slot in slots:
            known = self.slots.get(slot.key)
            self.slots[slot.key] = slot if known is None else known.joined(slot)

    def initialize(self, seed: int) -> Params:
        """Draw every array; what is not trained starts as it would in a model alone.

        Args:
            seed: Seed of the streams; each array has its own.
        """
        return {slot.key: _draw(slot, seed) for slot in self.slots.values()}

    def find(self, declared: Slot) -> Slot:
        """Return the array that a model's parameter is part of.

        Raises:
            InputError: There is none, or it is too small.
        """
        slot = self.slots.get(declared.key)
        if slot is None or slot.joined(declared).axes != slot.axes:
            raise InputError(
                "the supernet has no place for a parameter",
                where=declared.label,
                expected="an architecture of the space that the supernet was made for",
                found=declared.key if slot is None else f"{declared.key} of shape {axes_shape(declared.axes)}",
            )
        return slot

    def __repr__(self) -> str:
        total = sum(math.prod(axes_shape(slot.axes)) for slot in self.slots.values())
        return f"ParameterStore({len(self.slots)} arrays, {total:,} numbers)"


def slice_params(store: ParameterStore, values: Mapping[str, Any], graph: Graph, home_of: HomeOf) -> dict[str, Any]:
    """Take the parameters of one graph out of a store's arrays.

    Args:
        store: Says where they lie.
        values: Arrays or tensors by the store's keys.
        graph: The model.
        home_of: Where a parameter stands and which component declares it.

    Returns:
        Parts by the graph's own names; views where the layout allows it.

    Raises:
        InputError: The store has no place for a parameter.
    """
    declared = declared_slots(graph, home_of)
    return {label: slice_array(values[slot.key], store.find(slot).axes, slot.axes) for label, slot in declared.items()}


def slice_array(array: Any, large: Axes, small: Axes) -> Any:
    """Take what a smaller model has of an array or a tensor.

    Args:
        array: Its shape is that of `large`.
        large: Axes of the array; each dimension is the product of its axes.
        small: The same axes at smaller sizes.

    Returns:
        An array of the shape of `small`; the array itself where nothing is cut off.
    """
    if large == small:
        return array
    pairs = [pair for both in zip(large, small, strict=True) for pair in zip(*both, strict=True)]
    parts = tuple(_part(whole, part) for whole, part in pairs)
    return array.reshape([whole.size for whole, _ in pairs])[parts].reshape(axes_shape(small))


def _part(whole: Axis, part: Axis) -> slice:
    """Where the indices of an axis lie in those of a larger one of its kind."""
    starts = {PAST: whole.size - part.size, AROUND: (whole.size - 1) // 2 - (part.size - 1) // 2}
    start = starts.get(whole.name, 0)
    return slice(start, start + part.size)


def declared_slots(graph: Graph, home_of: HomeOf) -> dict[str, Slot]:
    """Return what array each parameter of a graph asks for, by the parameter's name."""
    parameters = {label: node.op for label, node in graph.parameters.items()}
    return {
        label: _slot(parameter, *home_of(label))
        for label, parameter in parameters.items()
        if isinstance(parameter, Parameter)
    }


def homes(architecture: Architecture, signature: Signature) -> HomeOf:
    """Return where each parameter of an architecture stands and which of its components declares it.

    Layers of a pyramid are counted in their stage, because the depth of the stages before may vary.
    """
    model = architecture.model
    ends = _ends(model, signature)
    staged = [(stage, index) for stage, config in enumerate(model.stages) for index in range(len(config.layers))]

    def home_of(label: str) -> tuple[str, str]:
        scope = label.rpartition(".")[0]
        part, *rest = label.split(".")
        if part == "layers":
            number = int(rest[0])
            stage, index = staged[number]
            place = scope if len(model.stages) == 1 else f"stages.{stage}.layers.{index}.{'.'.join(rest[1:-1])}"
            return place, _component_of_layer(model, number, rest[1:])
        if part == "transitions":
            return scope, (model.stages[int(rest[0])].transition or model.macro).key
        return scope, ends.get(part, model.macro).key

    return home_of


def _component_of_layer(model: ModelConfig, number: int, path: list[str]) -> str:
    """The component of a parameter by its path in the layer, such as `mixer.q`."""
    layer = model.layers[number]
    own = {"mixer": layer.token_mixer, "channel_mixer": layer.channel_mixer, "reducer": layer.reducer}
    is_norm = path[0].startswith("norm") and len(path) > 1
    return own.get(path[0], model.norm if is_norm else layer.wiring).key


def _ends(model: ModelConfig, signature: Signature) -> dict[str, ComponentConfig]:
    """The components outside the layers by their scopes."""
    conditioner = model.conditioner_for(signature)
    return {
        **({"condition": conditioner} if conditioner else {}),
        "stem": model.stem_for(signature),
        "head": model.head_for(signature),
        "position": model.position,
        "positions": model.position,
        "norm": model.final_norm or model.norm,
    }


def _slot(parameter: Parameter, scope: str, family: str) -> Slot:
    axes = tuple(tuple(Axis(_SAME_AXIS.get(axis.name, axis.name), axis.size) for axis in f) for f in parameter.axes)
    name = parameter.label.rpartition(".")[2]
    plain = ",".join("*".join(axis.name for axis in factors) for factors in axes)
    is_shared = scope.endswith("mixer") and _SHARED.get(name) == plain and parameter.trained
    structure = ",".join("*".join(_spelled(axis, parameter.trained) for axis in factors) for factors in axes)
    role = "gate" if name == "output_gate" and is_shared else name
    place = ".".join(filter(None, (scope, "any" if is_shared else family, role)))
    key = f"{place}[{structure}]"
    return Slot(key, parameter.label, axes, parameter.init, parameter.trained)


def _spelled(axis: Axis, trained: bool) -> str:
    """An axis in a key: with its size where each size has an array of its own."""
    return axis.name if trained and axis.name in _SHARED_AXES else f"{axis.name}={axis.size}"


def _larger(first: Axis, second: Axis) -> Axis:
    return second if second.size > first.size else first


def _draw(slot: Slot, seed: int) -> FloatArray:
    return draw(Parameter(slot.key if slot.trained else slot.label, slot.axes, slot.init, slot.trained), seed)
