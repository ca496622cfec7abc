"""Which architectures of a space one must look at to know every parameter that any of them has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from nas.supernet.store import ParameterStore, Slot, declared_slots, homes
from searchspaces.architecture import Architecture
from searchspaces.domains import Axis, Choices, Place
from searchspaces.signature import Signature
from searchspaces.space import Space

_TRIES = 8  # draws of everything else before a component counts as not to be had at a width
_MOST_COMBINATIONS = 64  # options of one component that are all combined; of more, each is varied by itself
_EXTRA_SAMPLES = 16  # random architectures looked at besides, against combinations that nothing else shows


def covering_store(space: Space, signature: Signature) -> ParameterStore:
    """Return a store with room for the parameters of every architecture of a space.

    Args:
        space: The space.
        signature: Inputs and outputs of the models.
    """

    def slots() -> Iterator[Slot]:
        for architecture in covering_architectures(space):
            graph = architecture.graph(signature)
            yield from declared_slots(graph, homes(architecture, signature)).values()

    return ParameterStore(slots())


def covering_architectures(space: Space) -> Iterator[Architecture]:
    """Give architectures that hold every component with every option at every width, at the largest depth.

    Every component stands once in the even and once in the odd layers; what stands in the others is random. Wirings are
    combined with norms too, because they decide how many norms there are.
    """
    rng = np.random.default_rng(0)
    yield from (space.largest(), space.centroid(), space.smallest())
    yield from (space.sample(rng) for _ in range(_EXTRA_SAMPLES))
    tree = space.tree
    widths = max(len(stage.d_model) for stage in tree.stages)
    for forced, width in itertools.product(_targets(space), range(widths)):
        chosen = forced | {stage.d_model.path: min(width, len(stage.d_model) - 1) for stage in tree.stages}
        chosen |= {stage.depth.path: len(stage.depth) - 1 for stage in tree.stages}
        architecture = _build(space, chosen, rng)
        if architecture is not None:
            yield architecture


def _targets(space: Space) -> Iterator[Choices]:
    """Give what has to occur: choices of one kind of component in every other place that offers it."""
    groups: dict[tuple[str, ...], list[Place]] = {}
    for _, place in space.tree.places(space.tree.largest_depths):
        names = (place.path.split("[")[0], *map(str, place.component.values))
        groups.setdefault(names, []).append(place)
    norms = [target for names, places in groups.items() if names[0] == "model.norm" for target in _fill(places)]
    for names, places in groups.items():
        for turn in range(min(2, len(places))):
            for target in _fill(places[turn::2]):
                if names[0].endswith(".wiring"):
                    yield from (target | norm for norm in norms or [{}])
                else:
                    yield target


def _fill(places: Sequence[Place]) -> Iterator[Choices]:
    """Give every component with every combination of options, in all of these places at once."""
    for index, axes in enumerate(places[0].options):
        for indices in _combinations([len(axis) for axis in axes]):
            filled: Choices = {}
            for place in places:
                paths = (axis.path for axis in place.options[index])
                filled |= {place.component.path: index} | dict(zip(paths, indices, strict=True))
            yield filled


def _combinations(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if math.prod(sizes) <= _MOST_COMBINATIONS:
        yield from itertools.product(*map(range, sizes))
        return
    for base in ([0] * len(sizes), [size - 1 for size in sizes]):
        for option, size in enumerate(sizes):
            yield from ((*base[:option], value, *base[option + 1 :]) for value in range(size))


def _build(space: Space, forced: Choices, rng: np.random.Generator) -> Architecture | None:
    """Return an architecture with these choices and random ones besides, None where they cannot be had."""

    def choose(axis: Axis) -> int:
        return forced.get(axis.path, int(rng.integers(len(axis))))

    for _ in range(_TRIES):
        built = space.tree.assemble(choose, rng)
        if isinstance(built, Architecture) and forced.items() <= space.choices(built).items():
            return built
    return None
