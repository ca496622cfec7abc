"""The tree of choices behind a space: how choices make an architecture, and how many there are.

Choices are made top-down: the width and depth, what holds for the whole model, then every layer's components and
their options. A component that cannot be built at the chosen width (heads that do not divide it, ...) is drawn again
on its own, so the depth of a model never makes it harder to find a valid one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from searchspaces.architecture import LAYER_SLOTS, Architecture, ComponentConfig, LayerConfig, ModelConfig, StageConfig
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
from searchspaces.order import UNORDERED, Order, Ways, either, product

PLACE_TRIES = 200  # draws of one component before its context counts as impossible


@dataclass(frozen=True, eq=False)
class StageTree:
    """What may vary in one stage.

    Attributes:
        d_model: Width of the residual stream.
        depth: Number of layers.
        transition: How tokens enter; None in the first stage.
        block_slots: Wiring, token mixer, channel mixer and reducer.
    """

    d_model: Axis
    depth: Axis
    transition: SlotDomain | None
    block_slots: tuple[SlotDomain, ...]

    @property
    def slots(self) -> tuple[SlotDomain, ...]:
        """All slots, top-down."""
        return (*([self.transition] if self.transition else []), *self.block_slots)

    def places(self, depth: int) -> list[Place]:
        """Return the places that a stage with this many layers fills, top-down."""
        blocks = (place for slot in self.block_slots for place in slot.places(depth))
        return [*([self.transition.place()] if self.transition else []), *blocks]

    def ways(self, causal: bool, position: str, without: frozenset[str], order: Order) -> Ways:
        """Count the stages whose blocks leave out the components of some keys, by the groups that they lead between."""
        ways = order.ways_of_none()
        for width, depth in itertools.product(self.d_model.values, self.depth.values):
            context = Context(integer(width), causal, position)
            entries = self.transition.count_valid(context) if self.transition else 1
            ways = either(ways, order.ways(self.block_slots, context, integer(depth), without, entries))
        return ways


@dataclass(frozen=True, eq=False)
class Tree:
    """Everything that may vary in a space, and the demands on the whole.

    Attributes:
        causal: True where models are decoders.
        position: How positions enter the model.
        model_slots: Norm and, where the file names them, final norm, stem, head and macro.
        stages: Stages from the input to the output.
        required: Component keys of which every architecture holds at least one; empty for no such demand.
        order: Which components come before which.
    """

    causal: bool
    position: SlotDomain
    model_slots: tuple[SlotDomain, ...]
    stages: tuple[StageTree, ...]
    required: tuple[str, ...]
    order: Order = UNORDERED

    @property
    def slots(self) -> tuple[SlotDomain, ...]:
        """All slots, top-down."""
        return (self.position, *self.model_slots, *(slot for stage in self.stages for slot in stage.slots))

    @property
    def sizes(self) -> tuple[Axis, ...]:
        """Width and depth of each stage."""
        return tuple(axis for stage in self.stages for axis in (stage.d_model, stage.depth))

    @property
    def largest_depths(self) -> tuple[int, ...]:
        """Layers of each stage at most."""
        return tuple(integer(stage.depth.values[-1]) for stage in self.stages)

    def axes(self, depths: Sequence[int]) -> tuple[Axis, ...]:
        """Return everything that may vary in a model with this many layers in each stage, top-down."""
        axes = (*self.sizes, *(axis for _, place in self.places(depths) for axis in place.axes))
        return tuple(axis for axis in axes if len(axis) > 1)

    def count(self) -> int:
        """Count the valid architectures."""
        total = 0
        for entry in self.position.entries:
            total += self._count_in(entry, frozenset())
            if self.required:
                total -= self._count_in(entry, frozenset(self.required))
        return total

    def enumerate(self) -> Iterator[Architecture]:
        """Give every valid architecture once."""
        for indices in itertools.product(*(range(len(axis)) for axis in self.sizes)):
            top = {axis.path: index for axis, index in zip(self.sizes, indices, strict=True)}
            ways = (tuple(place.nearest(lambda length: 0)) for _, place in self.places(self._depths(top)))
            for combination in itertools.product(*ways):
                choices = top | dict(itertools.chain.from_iterable(chosen.items() for chosen in combination))
                built = self.assemble(taken_from(choices), None)
                if isinstance(built, Architecture):
                    yield built

    def places(self, depths: Sequence[int]) -> list[tuple[int, Place]]:
        """Return the places that a model with this many layers in each stage fills, top-down, each with its stage."""
        blocks = [
            (index, place)
            for index, (stage, depth) in enumerate(zip(self.stages, depths, strict=True))
            for place in stage.places(depth)
        ]
        return [(0, self.position.place()), *((0, slot.place()) for slot in self.model_slots), *blocks]

    def assemble(self, choose: Chooser, rng: np.random.Generator | None) -> Architecture | str:
        """Make every choice top-down; where that cannot give a valid architecture, return the reason.

        Args:
            choose: Gives the index on an axis.
            rng: Draws a component anew where the chosen one does not fit; None takes only what `choose` gives.
        """
        choices = {axis.path: choose(axis) for axis in self.sizes}
        (_, position), *others = self.places(self._depths(choices))
        choices |= position.draw(choose)
        problem = position.problem(choices, self._context(0, choices, position))
        if problem:
            return problem
        for stage, place in others:
            drawn = _draw_fitting(place, self._context(stage, choices, position), choose, rng)
            if isinstance(drawn, str):
                return drawn
            choices |= drawn
        built = self._finish(choices)
        if isinstance(built, str) and rng is not None and not self._is_ordered(choices):
            built = self._finish(choices | self._ordered(choices, position, rng))
        return built

    def closest(self, prefer: Callable[[int], int]) -> Architecture | None:
        """Return a valid architecture close to the preferred index of every axis; `prefer` takes an axis' length."""
        depths = {stage.depth.path: prefer(len(stage.depth)) for stage in self.stages}
        (_, position), *others = self.places(self._depths(depths))
        axes = [stage.d_model for stage in self.stages]
        for widths in itertools.product(*(nearest_first(len(axis), prefer(len(axis))) for axis in axes)):
            for first in position.nearest(prefer):
                choices = depths | {axis.path: width for axis, width in zip(axes, widths, strict=True)} | first
                contexts = [self._context(stage, choices, position) for stage in range(len(self.stages))]
                placed = [(place, contexts[stage]) for stage, place in others]
                closest = [_closest_fitting(place, context, prefer, ()) for place, context in placed]
                if any(chosen is None for chosen in closest):
                    continue
                choices |= dict(itertools.chain.from_iterable((chosen or {}).items() for chosen in closest))
                built = self._finish(choices)
                built = built if isinstance(built, Architecture) else self._add_required(choices, placed, prefer)
                if built:
                    return built
        return None

    def _add_required(
        self, choices: Choices, places: Iterable[tuple[Place, Context]], prefer: Callable[[int], int]
    ) -> Architecture | None:
        """Replace one component by a required one, in the first place that offers it."""
        for place, context in places:
            chosen = _closest_fitting(place, context, prefer, self.required)
            built = self._finish(choices | chosen) if chosen else None
            if isinstance(built, Architecture):
                return built
        return None

    def _layers(self, choices: Choices) -> list[tuple[int, Place]]:
        """Return what fills the ordered slot of each layer, stem to head, with its stage."""
        return [
            (index, stage.block_slots[self.order.slot].place(layer))
            for index, (stage, depth) in enumerate(zip(self.stages, self._depths(choices), strict=True))
            for layer in range(depth)
        ]

    def _is_ordered(self, choices: Choices) -> bool:
        return not self.order.groups or self.order.allows(
            [place.config(choices).key for _, place in self._layers(choices)]
        )

    def _ordered(self, choices: Choices, position: Place, rng: np.random.Generator) -> Choices:
        """Draw as few layers anew as bring the components into their order; nothing where none of many draws can."""
        layers = self._layers(choices)
        ranks = [self.order.rank(place.config(choices).key) for _, place in layers]
        divisions = list(self.order.divisions(len(layers)))
        misplaced = [sum(rank not in (0, group) for rank, group in zip(ranks, d, strict=True)) for d in divisions]
        best = [d for d, count in zip(divisions, misplaced, strict=True) if count == min(misplaced)]
        groups = best[int(rng.integers(len(best)))]
        drawn: Choices = {}
        for (stage, place), rank, group in zip(layers, ranks, groups, strict=True):
            if rank not in (0, group):
                context = self._context(stage, choices, position)
                drawn |= _draw_among(place, context, rng, lambda key, group=group: self.order.rank(key) in (0, group))
        return drawn

    def _depths(self, choices: Choices) -> list[int]:
        return [integer(stage.depth.values[choices[stage.depth.path]]) for stage in self.stages]

    def _width(self, stage: int, choices: Choices) -> int:
        axis = self.stages[stage].d_model
        return integer(axis.values[choices[axis.path]])

    def _context(self, stage: int, choices: Choices, position: Place) -> Context:
        return Context(self._width(stage, choices), self.causal, position.config(choices).key)

    def _finish(self, choices: Choices) -> Architecture | str:
        """Return the architecture that complete choices make, or which demand on the whole it fails."""
        stages = tuple(
            StageConfig(
                self._width(index, choices),
                tuple(
                    LayerConfig(*(slot.place(layer).config(choices) for slot in stage.block_slots))
                    for layer in range(depth)
                ),
                stage.transition.place().config(choices) if stage.transition else None,
            )
            for index, (stage, depth) in enumerate(zip(self.stages, self._depths(choices), strict=True))
        )
        keys = {getattr(layer, slot).key for stage in stages for layer in stage.layers for slot in LAYER_SLOTS}
        if self.required and not keys & set(self.required):
            return f"constraints.at_least_one_of: it has none of {', '.join(self.required)}"
        if not self._is_ordered(choices):
            return "constraints.order: a layer comes after one of a later group"
        whole = {slot.path.removeprefix("model."): slot.place().config(choices) for slot in self.model_slots}
        return Architecture(
            ModelConfig(stages=stages, position=self.position.place().config(choices), causal=self.causal, **whole)
        )

    def find(self, model: ModelConfig) -> Choices | str:
        """Return the choices that make a model, or what of it the space does not offer."""
        if model.causal != self.causal or len(model.stages) != len(self.stages):
            return f"causal {model.causal} with {len(model.stages)} stages"
        choices: Choices = {}
        for stage, config in zip(self.stages, model.stages, strict=True):
            width, depth = config.d_model, len(config.layers)
            if width not in stage.d_model.values or depth not in stage.depth.values:
                return f"d_model {width} with depth {depth}"
            choices[stage.d_model.path] = stage.d_model.values.index(width)
            choices[stage.depth.path] = stage.depth.values.index(depth)
        for place, config in self._filled(model):
            found = place.choices(config) if config else None
            if found is None or any(choices.get(path, index) != index for path, index in found.items()):
                return f"{place.path}: {config}"
            choices |= found
        return choices

    def _filled(self, model: ModelConfig) -> Iterator[tuple[Place, ComponentConfig | None]]:
        """Give every place of a model with what fills it; a shared place once for each layer."""
        yield self.position.place(), model.position
        for slot in self.model_slots:
            yield slot.place(), getattr(model, slot.path.removeprefix("model."))
        for stage, config in zip(self.stages, model.stages, strict=True):
            if stage.transition:
                yield stage.transition.place(), config.transition
            for index, layer in enumerate(config.layers):
                for slot, name in zip(stage.block_slots, LAYER_SLOTS, strict=True):
                    yield slot.place(index), getattr(layer, name)

    def _count_in(self, position: ComponentDomain, without: frozenset[str]) -> int:
        """Count the architectures with a position whose blocks leave out the components of some keys."""
        context = Context(integer(self.stages[0].d_model.values[0]), self.causal, position.key)
        whole = position.count_valid(context) * math.prod(slot.count_valid(context) for slot in self.model_slots)
        stages = (stage.ways(self.causal, position.key, without, self.order) for stage in self.stages)
        return whole * sum(functools.reduce(product, stages)[0])


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


def _draw_among(place: Place, context: Context, rng: np.random.Generator, allowed: Callable[[str], bool]) -> Choices:
    """Draw a component that can be built and is allowed; nothing where none of many is."""
    for _ in range(PLACE_TRIES):
        drawn = place.draw(lambda axis: int(rng.integers(len(axis))))
        if allowed(place.config(drawn).key) and place.problem(drawn, context) is None:
            return drawn
    return {}


def _closest_fitting(
    place: Place, context: Context, prefer: Callable[[int], int], among: tuple[str, ...]
) -> Choices | None:
    """Return the buildable choices closest to the preferred ones, of the components in `among` if it names any."""
    for choices in itertools.islice(place.nearest(prefer), MAX_COMBINATIONS):
        if place.problem(choices, context) is None and (not among or place.config(choices).key in among):
            return choices
    return None
