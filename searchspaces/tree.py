"""The tree of choices behind a space: how choices make an architecture, and how many there are.

Choices are made top-down: the width and depth, what holds for the whole model, then every layer's components and
their options. A component that cannot be built at the chosen width (heads that do not divide it, ...) is drawn again
on its own, so the depth of a model never makes it harder to find a valid one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from searchspaces.architecture import Architecture, ComponentConfig, LayerConfig, ModelConfig
from searchspaces.domains import (
    MAX_COMBINATIONS,
    Axis,
    Choices,
    Chooser,
    ComponentDomain,
    Context,
    Place,
    SlotDomain,
    nearest_first,
)

PLACE_TRIES = 200  # draws of one component before its context counts as impossible


@dataclass(frozen=True, eq=False)
class Tree:
    """Everything that may vary in a space, and the demands on the whole.

    Attributes:
        causal: True where models are decoders.
        d_model: Width of the residual stream.
        depth: Number of layers.
        position: How positions enter the model.
        model_slots: Norm and, where the file names them, stem and head.
        block_slots: Wiring, token mixer and channel mixer.
        required: Component keys of which every architecture holds at least one; empty for no such demand.
    """

    causal: bool
    d_model: Axis
    depth: Axis
    position: SlotDomain
    model_slots: tuple[SlotDomain, ...]
    block_slots: tuple[SlotDomain, ...]
    required: tuple[str, ...]

    @property
    def slots(self) -> tuple[SlotDomain, ...]:
        """All slots, top-down."""
        return (self.position, *self.model_slots, *self.block_slots)

    def axes(self, depth: int) -> tuple[Axis, ...]:
        """Return everything that may vary in a model with this many layers, top-down."""
        axes = (self.d_model, self.depth, *(axis for place in self.places(depth) for axis in place.axes))
        return tuple(axis for axis in axes if len(axis) > 1)

    def count(self) -> int:
        """Count the valid architectures."""
        total = 0
        for width, entry in itertools.product(self.d_model.values, self.position.entries):
            context = Context(integer(width), self.causal, entry.key)
            total += self._count_in(context, entry, frozenset())
            if self.required:
                total -= self._count_in(context, entry, frozenset(self.required))
        return total

    def enumerate(self) -> Iterator[Architecture]:
        """Give every valid architecture once."""
        for width, depth in itertools.product(range(len(self.d_model)), range(len(self.depth))):
            top = {self.d_model.path: width, self.depth.path: depth}
            ways = (tuple(place.nearest(lambda length: 0)) for place in self.places(integer(self.depth.values[depth])))
            for combination in itertools.product(*ways):
                choices = top | dict(itertools.chain.from_iterable(chosen.items() for chosen in combination))
                built = self.assemble(taken_from(choices), None)
                if isinstance(built, Architecture):
                    yield built

    def places(self, depth: int) -> list[Place]:
        """Return the places that a model with this many layers fills, top-down."""
        blocks = (place for slot in self.block_slots for place in slot.places(depth))
        return [self.position.place(), *(slot.place() for slot in self.model_slots), *blocks]

    def assemble(self, choose: Chooser, rng: np.random.Generator | None) -> Architecture | str:
        """Make every choice top-down; where that cannot give a valid architecture, return the reason.

        Args:
            choose: Gives the index on an axis.
            rng: Draws a component anew where the chosen one does not fit; None takes only what `choose` gives.
        """
        choices = {axis.path: choose(axis) for axis in (self.d_model, self.depth)}
        position, *others = self.places(integer(self.depth.values[choices[self.depth.path]]))
        choices |= position.draw(choose)
        context = self._context(choices, position)
        problem = position.problem(choices, context)
        if problem:
            return problem
        for place in others:
            drawn = _draw_fitting(place, context, choose, rng)
            if isinstance(drawn, str):
                return drawn
            choices |= drawn
        return self._finish(choices)

    def closest(self, prefer: Callable[[int], int]) -> Architecture | None:
        """Return a valid architecture close to the preferred index of every axis; `prefer` takes an axis' length."""
        depth = prefer(len(self.depth))
        position, *others = self.places(integer(self.depth.values[depth]))
        for width in nearest_first(len(self.d_model), prefer(len(self.d_model))):
            for first in position.nearest(prefer):
                choices = {self.d_model.path: width, self.depth.path: depth} | first
                context = self._context(choices, position)
                closest = [_closest_fitting(place, context, prefer, ()) for place in others]
                if any(chosen is None for chosen in closest):
                    continue
                choices |= dict(itertools.chain.from_iterable((chosen or {}).items() for chosen in closest))
                built = self._finish(choices)
                built = (
                    built if isinstance(built, Architecture) else self._add_required(choices, context, others, prefer)
                )
                if built:
                    return built
        return None

    def _add_required(
        self, choices: Choices, context: Context, places: Iterable[Place], prefer: Callable[[int], int]
    ) -> Architecture | None:
        """Replace one component by a required one, in the first place that offers it."""
        for place in places:
            chosen = _closest_fitting(place, context, prefer, self.required)
            built = self._finish(choices | chosen) if chosen else None
            if isinstance(built, Architecture):
                return built
        return None

    def _context(self, choices: Choices, position: Place) -> Context:
        width = integer(self.d_model.values[choices[self.d_model.path]])
        return Context(width, self.causal, position.config(choices).key)

    def _finish(self, choices: Choices) -> Architecture | str:
        """Return the architecture that complete choices make, or which demand on the whole it fails."""
        depth = integer(self.depth.values[choices[self.depth.path]])
        layers = [
            [slot.place(layer if slot.per_layer else None).config(choices) for slot in self.block_slots]
            for layer in range(depth)
        ]
        whole = {slot.kind: slot.place().config(choices) for slot in self.model_slots}
        if self.required and not any(config.key in self.required for layer in layers for config in layer):
            return f"constraints.at_least_one_of: it has none of {', '.join(self.required)}"
        model = ModelConfig(
            d_model=integer(self.d_model.values[choices[self.d_model.path]]),
            depth=depth,
            norm=whole["norm"],
            position=self.position.place().config(choices),
            causal=self.causal,
            layers=tuple(LayerConfig(*layer) for layer in layers),
            stem=whole.get("stem"),
            head=whole.get("head"),
        )
        return Architecture(model)

    def find(self, model: ModelConfig) -> Choices | str:
        """Return the choices that make a model, or what of it the space does not offer."""
        if model.d_model not in self.d_model.values or model.depth not in self.depth.values:
            return f"d_model {model.d_model} with depth {model.depth}"
        if model.causal != self.causal or model.depth != len(model.layers):
            return f"causal {model.causal} with {len(model.layers)} layers"
        choices = {
            self.d_model.path: self.d_model.values.index(model.d_model),
            self.depth.path: self.depth.values.index(model.depth),
        }
        for place, config in self._filled(model):
            found = place.choices(config) if config else None
            if found is None or any(choices.get(path, index) != index for path, index in found.items()):
                return f"{place.path}: {config}"
            choices |= found
        return choices

    def _filled(self, model: ModelConfig) -> Iterator[tuple[Place, ComponentConfig | None]]:
        """Give every place of a model with what fills it; a shared place once for each layer."""
        yield self.position.place(), model.position
        whole = {"norm": model.norm, "stem": model.stem, "head": model.head}
        for slot in self.model_slots:
            yield slot.place(), whole[slot.kind]
        for index, layer in enumerate(model.layers):
            configs = (layer.wiring, layer.token_mixer, layer.channel_mixer)
            for slot, config in zip(self.block_slots, configs, strict=True):
                yield slot.place(index if slot.per_layer else None), config

    def _count_in(self, context: Context, position: ComponentDomain, without: frozenset[str]) -> int:
        """Count the architectures of a context whose blocks leave out the components of some keys."""
        whole = position.count_valid(context) * math.prod(slot.count_valid(context) for slot in self.model_slots)
        slots = [(slot.count_valid(context, without=without), slot.per_layer) for slot in self.block_slots]
        depths = (integer(depth) for depth in self.depth.values)
        return whole * sum(math.prod(ways ** (depth if each else 1) for ways, each in slots) for depth in depths)


def integer(value: object) -> int:
    """Return a value that the schema has checked to be an integer."""
    assert isinstance(value, int)
    return value


def taken_from(choices: Choices) -> Chooser:
    """Return a chooser that takes the choices made before."""
    return lambda axis: choices[axis.path]


def _draw_fitting(place: Place, context: Context, choose: Chooser, rng: np.random.Generator | None) -> Choices | str:
    """Draw a component that can be built; return the reason where none of many can."""
    drawn = place.draw(choose)
    problem = place.problem(drawn, context)
    for _ in range(PLACE_TRIES if rng else 0):
        if problem is None:
            break
        drawn = place.draw(lambda axis: int(rng.integers(len(axis))) if rng else 0)
        problem = place.problem(drawn, context)
    return problem or drawn


def _closest_fitting(
    place: Place, context: Context, prefer: Callable[[int], int], among: tuple[str, ...]
) -> Choices | None:
    """Return the buildable choices closest to the preferred ones, of the components in `among` if it names any."""
    for choices in itertools.islice(place.nearest(prefer), MAX_COMBINATIONS):
        if place.problem(choices, context) is None and (not among or place.config(choices).key in among):
            return choices
    return None
