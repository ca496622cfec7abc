"""What may vary at one place of a space: values of an option, options of a component, components of a slot.

A `SlotDomain` holds only real components, real options and values within their bounds: `checking.py` sees to it. What
remains is whether a component fits the context that other choices make, such as heads that must divide the width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

from ir.component import Component, TokenMixer
from ir.errors import NasError
from ir.ops.structure import OptionValue
from searchspaces.architecture import ComponentConfig

MAX_COMBINATIONS = 20_000  # option combinations of one component that are checked one by one

Choices: TypeAlias = dict[str, int]
Chooser: TypeAlias = "Callable[[Axis], int]"


@dataclass(frozen=True)
class Axis:
    """One choice of a space.

    Attributes:
        path: Where it is, as `block.token_mixer[2].softmax_attention.num_heads`.
        values: What it may be: numbers and words of an option, names of components.
    """

    path: str
    values: Sequence[OptionValue]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Context:
    """What a component has to fit: the choices made above it."""

    d_model: int
    causal: bool
    position: str


@dataclass(frozen=True)
class ComponentDomain:
    """A component that a slot offers, with what the space says about its options.

    Attributes:
        label: The component's name in the file: a key or an alias.
        key: Registry key.
        component: The component class.
        settled: Every option with one value, sorted by name.
        free: The options that may vary and their values.
    """

    label: str
    key: str
    component: type[Component]
    settled: tuple[tuple[str, OptionValue], ...]
    free: tuple[tuple[str, Sequence[OptionValue]], ...]

    @property
    def combinations(self) -> int:
        """Number of ways to set the options."""
        return math.prod(len(values) for _, values in self.free)

    @cached_property
    def _configs(self) -> dict[tuple[int, ...], ComponentConfig]:
        """Components made so far, by indices: a search makes the same few again and again."""
        return {}

    def config(self, indices: Sequence[int]) -> ComponentConfig:
        """Return the component with its free options set to the values at these indices."""
        indices = tuple(indices)
        config = self._configs.get(indices)
        if config is None:
            chosen = [(name, values[index]) for (name, values), index in zip(self.free, indices, strict=True)]
            config = self._configs[indices] = ComponentConfig(self.key, tuple(sorted((*self.settled, *chosen))))
        return config

    def indices(self, config: ComponentConfig) -> tuple[int, ...] | None:
        """Return where the free options of a component stand, None if this domain does not contain it."""
        values = config.values
        names = {name for name, _ in (*self.settled, *self.free)}
        if config.key != self.key or set(values) != names or any(values[name] != value for name, value in self.settled):
            return None
        if any(values[name] not in domain for name, domain in self.free):
            return None
        return tuple(domain.index(values[name]) for name, domain in self.free)

    def problem(self, indices: Sequence[int], context: Context) -> str | None:
        """Return why the component cannot be built in a context with these options, None if it can."""
        return _component_problem(self.component, self.config(indices).options, context)

    def count_valid(self, context: Context) -> int:
        """Count the ways to set the options that can be built; all of them where there are too many to check."""
        if self.combinations > MAX_COMBINATIONS:
            return self.combinations
        return sum(self.problem(indices, context) is None for indices in self._all_indices())

    def first_problem(self, contexts: Sequence[Context]) -> str | None:
        """Return why no way to set the options can be built in any context.

        None if some can be, or if there are too many to tell.
        """
        if self.combinations * len(contexts) > MAX_COMBINATIONS:
            return None
        tries = itertools.product(self._all_indices(), contexts)
        problems = [self.problem(indices, context) for indices, context in tries]
        return None if None in problems else problems[0]

    def _all_indices(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(len(values)) for _, values in self.free))


@dataclass(frozen=True)
class Place:
    """A slot at one layer, or of the whole model: its axes.

    Attributes:
        path: `block.token_mixer[2]`.
        entries: Components on offer.
        component: Which of them.
        options: The free options of each.
    """

    path: str
    entries: tuple[ComponentDomain, ...]
    component: Axis
    options: tuple[tuple[Axis, ...], ...]

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The component and then every component's options."""
        return (self.component, *itertools.chain.from_iterable(self.options))

    def draw(self, choose: Chooser) -> Choices:
        """Choose a component and its options."""
        index = choose(self.component)
        return {self.component.path: index} | {axis.path: choose(axis) for axis in self.options[index]}

    def config(self, choices: Mapping[str, int]) -> ComponentConfig:
        """Return the component that these choices make."""
        entry, indices = self._chosen(choices)
        return entry.config(indices)

    def problem(self, choices: Mapping[str, int], context: Context) -> str | None:
        """Return why the chosen component cannot be built, None if it can."""
        entry, indices = self._chosen(choices)
        problem = entry.problem(indices, context)
        return f"{self.path}.{entry.label}: {problem}" if problem else None

    def choices(self, config: ComponentConfig) -> Choices | None:
        """Return the choices that make a component, None if the slot does not offer it."""
        if config not in self._found:
            self._found[config] = self._find(config)
        return self._found[config]

    @cached_property
    def _found(self) -> dict[ComponentConfig, Choices | None]:
        """Choices of components that were looked for, `None` where the slot does not offer one."""
        return {}

    def _find(self, config: ComponentConfig) -> Choices | None:
        for index, entry in enumerate(self.entries):
            indices = entry.indices(config)
            if indices is not None:
                paths = (axis.path for axis in self.options[index])
                return {self.component.path: index} | dict(zip(paths, indices, strict=True))
        return None

    def nearest(self, prefer: Callable[[int], int]) -> Iterator[Choices]:
        """Give all choices, from the preferred index of each axis (`prefer` takes its length) outwards."""
        for index in nearest_first(len(self.component), prefer(len(self.component))):
            axes = self.options[index]
            for indices in itertools.product(*(nearest_first(len(axis), prefer(len(axis))) for axis in axes)):
                chosen = {axis.path: value for axis, value in zip(axes, indices, strict=True)}
                yield {self.component.path: index} | chosen

    def _chosen(self, choices: Mapping[str, int]) -> tuple[ComponentDomain, tuple[int, ...]]:
        index = choices[self.component.path]
        return self.entries[index], tuple(choices[axis.path] for axis in self.options[index])


@dataclass(frozen=True)
class SlotDomain:
    """The components that may fill a slot.

    Attributes:
        kind: Kind of component.
        path: `block.token_mixer`.
        entries: Components on offer; all of the pattern, if there is one.
        per_layer: Each layer draws its own.
        pattern: Slots that the layers take in turn, from the first of their stage on; empty where all are alike.
    """

    kind: str
    path: str
    entries: tuple[ComponentDomain, ...]
    per_layer: bool = False
    pattern: tuple[SlotDomain, ...] = ()

    def place(self, layer: int = 0) -> Place:
        """Return the place that fills the slot at a layer; layers may share it."""
        if self.pattern:
            return self.pattern[layer % len(self.pattern)].place()
        return self._place(f"{self.path}[{layer}]" if self.per_layer else self.path)

    @cached_property
    def _places(self) -> dict[str, Place]:
        """Places made so far, by path."""
        return {}

    def _place(self, path: str) -> Place:
        if path not in self._places:
            self._places[path] = self._make_place(path)
        return self._places[path]

    def _make_place(self, path: str) -> Place:
        component = Axis(path, tuple(entry.label for entry in self.entries))
        options = tuple(
            tuple(Axis(f"{path}.{entry.label}.{name}", values) for name, values in entry.free) for entry in self.entries
        )
        return Place(path, self.entries, component, options)

    def offered(self) -> tuple[Place, ...]:
        """Return what the slot offers, whatever the layer: one place, or one for each turn of a pattern."""
        if self.pattern:
            return tuple(place for part in self.pattern for place in part.offered())
        return (self._place(self.path),)

    def places(self, depth: int) -> tuple[Place, ...]:
        """Return the places of a model with this many layers: one for each, or one for all."""
        if self.pattern:
            return tuple(part.place() for part in self.pattern[:depth])
        return tuple(self.place(layer) for layer in range(depth if self.per_layer else min(depth, 1)))

    def count_valid(self, context: Context, depth: int = 1, *, without: frozenset[str] = frozenset()) -> int:
        """Count the ways to fill the slot in so many layers, leaving out the components of some keys."""
        if self.pattern:
            return math.prod(part.count_valid(context, without=without) for part in self.pattern[:depth])
        ways = sum(entry.count_valid(context) for entry in self.entries if entry.key not in without)
        return ways ** (depth if self.per_layer else min(depth, 1))


@lru_cache(maxsize=2**16)
def _component_problem(
    component: type[Component], options: tuple[tuple[str, OptionValue], ...], context: Context
) -> str | None:
    """Return why a component cannot be built at a context's width, or looks ahead in a decoder; None if all is well."""
    try:
        built = component.create(dict(options), {"causal": context.causal, "position": context.position})
    except NasError as error:
        return error.message
    if not isinstance(built, TokenMixer):
        return None
    if context.causal and not built.is_causal:
        return "it looks ahead, which a decoder must not"
    return built.check(context.d_model)


def nearest_first(length: int, preferred: int) -> list[int]:
    """Return all indices, the preferred one first and then by distance from it."""
    return sorted(range(length), key=lambda index: (abs(index - preferred), index))
