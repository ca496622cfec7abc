"""Architectures as one way for each of several places, and what a way adds to each value."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ir.errors import InputError

Values: TypeAlias = NDArray[np.float64]
Judge: TypeAlias = Callable[[Any], "Values | None"]

_BASE_TRIES: Final = 300
_PAIRS_TRIED: Final = 32
_MOST_WAYS: Final = 20_000  # to fill one layer


@dataclass(frozen=True)
class Frame:
    """Architectures that have something in common; what is left open is one way for each place.

    Attributes:
        groups: Name of each place; places of one name are alike.
        ways: How many ways there are at each place.
        build: Makes the architecture of one way for each place, None where there is none.
        serves: For each place whether its ways meet the demand that one of the places must meet; empty for none.
    """

    groups: tuple[str, ...]
    ways: tuple[int, ...]
    build: Callable[[Sequence[int]], Any]
    serves: tuple[tuple[bool, ...], ...] = ()


@dataclass(frozen=True)
class Table:
    """What an architecture of a frame is worth: the base's values and what each way adds to them.

    Attributes:
        frame: The frame.
        base: Values of one architecture.
        added: For each place, what each way adds, `[ways, values]`; NaN for a way that cannot be had.
    """

    frame: Frame
    base: Values
    added: tuple[Values, ...]

    def values(self, chosen: Sequence[int]) -> Values:
        """Return the values of an architecture by the table."""
        return self.base + sum(added[way] for added, way in zip(self.added, chosen, strict=True))

    def draw(self, rng: np.random.Generator) -> list[int]:
        """Draw a way for each place."""
        return [int(rng.choice(np.flatnonzero(np.isfinite(added[:, 0])))) for added in self.added]


def tabulate(frame: Frame, judge: Judge, rng: np.random.Generator) -> Table | None:
    """Return what each way adds, found by changing one place at a time; None where nothing can be built.

    Args:
        frame: The architectures.
        judge: Values of an architecture, None where it has none.
        rng: Draws the base.
    """
    base = _find_base(frame, judge, rng)
    if base is None:
        return None
    chosen, values = base
    found: dict[str, Values] = {}
    for place, (group, ways) in enumerate(zip(frame.groups, frame.ways, strict=True)):
        if group in found:
            continue
        rows = np.full((ways, len(values)), np.nan)
        for way in range(ways):
            changed = judge(frame.build([*chosen[:place], way, *chosen[place + 1 :]]))
            if changed is not None:
                rows[way] = changed - values
        found[group] = rows
    return Table(frame, values, tuple(found[group] for group in frame.groups))


def frames_of(space: Any, judge: Judge, rng: np.random.Generator, *, fixes_all: bool = False) -> Iterator[Frame]:
    """Return frames that hold all architectures of a space, such that within each the values may add.

    Width, depth, and those choices for the whole model that change what other choices add, are fixed in each frame.

    Args:
        space: A space of a YAML file; or any with `places()`, the number of ways at each place, and `assemble(ways)`.
        judge: Values of an architecture, None where it has none.
        rng: Draws what is tried.
        fixes_all: True to fix every choice for the whole model, without a look at which interact.

    Raises:
        InputError: The space is neither, or has too many ways to fill a layer.
    """
    if hasattr(space, "places") and hasattr(space, "assemble"):
        ways = tuple(space.places())
        return iter([Frame(tuple(map(str, range(len(ways)))), ways, space.assemble)])
    if not hasattr(space, "tree"):
        raise InputError(
            "this space does not say what an architecture is made of",
            expected="a space of a YAML file, or one with `places()` and `assemble(ways)`",
            found=type(space).__name__,
        )
    model = _Model(space)
    fixed = _find_fixed(model, judge, rng)
    if fixes_all:
        fixed = [unit.name for unit in model.units(model.sizes()[-1]) if unit.is_whole and len(unit.ways) > 1]
    return model.frames(fixed)


@dataclass(frozen=True)
class _Unit:
    """Places of a model that are filled together: one alone, or all of a layer.

    Attributes:
        name: Path of the first.
        group: Units of one group are alike.
        ways: All choices, by path of their axes.
        serves: For each way whether it has a component of which a model needs at least one.
        is_whole: True for what holds for all layers.
    """

    name: str
    group: str
    ways: tuple[dict[str, int], ...]
    serves: tuple[bool, ...]
    is_whole: bool


@dataclass
class _Model:
    """The places of a space that came from a file.

    Attributes:
        space: The space.
        joins_layers: True to take all of a layer as one unit.
    """

    space: Any
    joins_layers: bool = False

    def sizes(self) -> list[dict[str, int]]:
        """Return every width and depth, the largest last."""
        axes = self.space.tree.sizes
        ranges = itertools.product(*(range(len(axis)) for axis in axes))
        return [{axis.path: index for axis, index in zip(axes, indices, strict=True)} for indices in ranges]

    def units(self, size: Mapping[str, int]) -> list[_Unit]:
        """Return the units of a model of this size."""
        stages = self.space.tree.stages
        depths = [stage.depth.values[size[stage.depth.path]] for stage in stages]
        placed: dict[str, Any] = {}
        used: dict[str, list[int]] = {}
        for stage, place in self.space.tree.places(depths):
            placed[place.path] = place
            used.setdefault(place.path, []).append(stage)  # stages may share a place
        together: dict[tuple[str, str], list[Any]] = {}
        for path, place in placed.items():
            slot, _, layer = path.rpartition("[") if path.endswith("]") else (path, "", "")
            apart = "" if layer and self.joins_layers else slot
            together.setdefault((f"{apart} {used[path]}", layer), []).append(place)
        return [self._unit(group, layer, places) for (group, layer), places in together.items()]

    def frame(self, size: Mapping[str, int], fixed: Mapping[str, int]) -> Frame:
        """Return the frame of one size, and one way for each of some units by their names."""
        units = self.units(size)
        left = [unit for unit in units if unit.name not in fixed]
        settled = dict(size)
        for unit in units:
            settled |= unit.ways[fixed[unit.name]] if unit.name in fixed else {}

        def build(chosen: Sequence[int]) -> Any:
            choices = dict(settled)
            for unit, way in zip(left, chosen, strict=True):
                choices |= unit.ways[way]
            built = self.space.tree.assemble(lambda axis: choices[axis.path], None)
            return None if isinstance(built, str) else built

        is_met = not self.space.tree.required or any(
            unit.serves[fixed[unit.name]] for unit in units if unit.name in fixed
        )
        serves = () if is_met else tuple(unit.serves for unit in left)
        return Frame(tuple(unit.group for unit in left), tuple(len(unit.ways) for unit in left), build, serves)

    def frames(self, fixed: Sequence[str]) -> Iterator[Frame]:
        """Return the frames of all sizes and all ways of the units that are fixed."""
        parts = [(size, [unit for unit in self.units(size) if unit.name in fixed]) for size in self.sizes()]
        for size, here in parts:
            for ways in itertools.product(*(range(len(unit.ways)) for unit in here)):
                yield self.frame(size, {unit.name: way for unit, way in zip(here, ways, strict=True)})

    def _unit(self, group: str, layer: str, places: Sequence[Any]) -> _Unit:
        combinations = itertools.product(*(list(place.nearest(lambda _: 0)) for place in places))
        if math.prod(sum(math.prod(map(len, axes)) for axes in place.options) for place in places) > _MOST_WAYS:
            raise InputError(
                "this space offers too many ways to fill a layer",
                where=places[0].path,
                expected=f"at most {_MOST_WAYS:,}",
                hint="leave fewer values in the space, or take another strategy",
            )
        ways: list[dict[str, int]] = []
        serves: list[bool] = []
        required = frozenset(self.space.tree.required)
        for combination in combinations:
            ways.append(dict(itertools.chain.from_iterable(way.items() for way in combination)))
            keys = {
                place.config(way).key for place, way in zip(places, combination, strict=True) if "block." in place.path
            }
            serves.append(bool(keys & required))
        return _Unit(places[0].path, group, tuple(ways), tuple(serves), not layer)


def _find_fixed(model: _Model, judge: Judge, rng: np.random.Generator) -> list[str]:
    """Return the units of the whole model that are fixed in each frame: few, such that no others seem to interact.

    Two units interact when changing both is not the sum of changing either, in some of a few tries. The one that
    interacts with most others is fixed first, and the rest is tried again for each of its ways. Where units of one
    layer interact, layers are joined.
    """
    size = model.sizes()[-1]
    fixed: list[str] = []
    while True:
        units = model.units(size)
        here = [unit for unit in units if unit.name in fixed]
        left = [unit for unit in units if unit.name not in fixed]
        pairs: set[tuple[int, int]] = set()
        for ways in itertools.product(*(range(len(unit.ways)) for unit in here)):
            frame = model.frame(size, {unit.name: way for unit, way in zip(here, ways, strict=True)})
            pairs |= _find_pairs(frame, judge, rng)
        if not model.joins_layers and any(not left[one].is_whole and not left[other].is_whole for one, other in pairs):
            model.joins_layers = True
            continue
        counted = Counter(place for pair in pairs for place in pair if left[place].is_whole)
        if not counted:
            return fixed  # what is left may be two layers: the check of the table will say so
        worst = min(counted, key=lambda place: (-counted[place], len(left[place].ways), place))
        fixed.append(left[worst].name)


def _find_pairs(frame: Frame, judge: Judge, rng: np.random.Generator) -> set[tuple[int, int]]:
    """Return which places interact, the first of each group alone."""
    base = _find_base(frame, judge, rng)
    if base is None:
        return set()
    first = sorted({group: place for place, group in reversed(list(enumerate(frame.groups)))}.values())
    return {pair for pair in itertools.combinations(first, 2) if _interact(frame, judge, base, *pair, rng)}


def _interact(
    frame: Frame, judge: Judge, base: tuple[list[int], Values], one: int, other: int, rng: np.random.Generator
) -> bool:
    chosen, values = base

    @functools.cache
    def changed(first: int, second: int) -> Values | None:
        ways = {one: first, other: second}
        return judge(frame.build([ways.get(place, way) for place, way in enumerate(chosen)]))

    others = [[way for way in range(frame.ways[place]) if way != chosen[place]] for place in (one, other)]
    every = list(itertools.product(*others))
    for index in rng.permutation(len(every))[:_PAIRS_TRIED]:
        first, second = every[int(index)]
        both, a, b = changed(first, second), changed(first, chosen[other]), changed(chosen[one], second)
        if both is None or a is None or b is None:
            continue
        if not np.allclose(both - a, b - values, rtol=1e-9, atol=1e-9 * float(np.abs(values).max())):
            return True
    return False


def _find_base(frame: Frame, judge: Judge, rng: np.random.Generator) -> tuple[list[int], Values] | None:
    """Return an architecture with values whose places of one group are filled alike."""
    for _ in range(_BASE_TRIES):
        of_group = {group: int(rng.integers(ways)) for group, ways in zip(frame.groups, frame.ways, strict=True)}
        chosen = [of_group[group] for group in frame.groups]
        values = judge(frame.build(chosen))
        if values is not None:
            return chosen, values
    return None
