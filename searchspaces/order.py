"""Order among layers: which components must come before which on the way from stem to head.

An order has groups of component keys, such as convolutions and then attention. Layers pass from one group to the next
and never back; components in no group stand anywhere. A group may be left out.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from searchspaces.domains import Context, SlotDomain

Ways: TypeAlias = tuple[tuple[int, ...], ...]
"""`ways[s][t]`: in how many ways some layers lead from group s to group t; group 0 is before the first."""


@dataclass(frozen=True)
class Order:
    """Groups of component keys of one slot, first to last.

    Attributes:
        slot: Index of the slot among those of a layer.
        groups: Keys of each group; none for a space without this demand.
    """

    slot: int = 0
    groups: tuple[frozenset[str], ...] = ()

    def __str__(self) -> str:
        return " before ".join(", ".join(sorted(group)) for group in self.groups)

    def rank(self, key: str) -> int:
        """Return the number of a component's group from 1, or 0 where it is in none."""
        return next((number for number, group in enumerate(self.groups, 1) if key in group), 0)

    def allows(self, keys: Sequence[str]) -> bool:
        """Tell whether layers with these components, stem to head, never go back."""
        ranks = [rank for key in keys if (rank := self.rank(key))]
        return ranks == sorted(ranks)

    def divisions(self, layers: int) -> Iterator[tuple[int, ...]]:
        """Give every way to divide layers among the groups, as the group of each layer from 1."""
        for cuts in itertools.combinations_with_replacement(range(layers + 1), max(len(self.groups) - 1, 0)):
            yield tuple(1 + sum(layer >= cut for cut in cuts) for layer in range(layers))

    def ways(
        self, slots: Sequence[SlotDomain], context: Context, depth: int, without: frozenset[str], entries: int
    ) -> Ways:
        """Count the ways to fill the layers of a stage.

        Args:
            slots: What each layer has.
            context: What the components have to fit.
            depth: Number of layers.
            without: Keys of components that are left out.
            entries: Ways to enter the stage, which multiply all others.
        """
        others = (slot for index, slot in enumerate(slots) if index != self.slot)
        times = entries * math.prod(slot.count_valid(context, depth, without=without) for slot in others)
        slot = slots[self.slot]
        if slot.per_layer:
            step = self._step(self._counts(slot, context, without))
            ways = functools.reduce(product, [step] * depth, self._identity())
        else:
            ways = self._turns(slot, context, depth, without)
        return tuple(tuple(times * count for count in row) for row in ways)

    def ways_of_none(self) -> Ways:
        """Return what `either` adds nothing to."""
        return tuple((0,) * (len(self.groups) + 1) for _ in range(len(self.groups) + 1))

    def _turns(self, slot: SlotDomain, context: Context, depth: int, without: frozenset[str]) -> Ways:
        """Count the ways of layers that take turns among a few components."""
        parts = [self._counts(part, context, without) for part in (slot.pattern or (slot,))[:depth]]
        size = len(self.groups) + 1
        ways = [[0] * size for _ in range(size)]
        for ranks in itertools.product(*([rank for rank, count in enumerate(part) if count] for part in parts)):
            count = 1
            for part, rank in zip(parts, ranks, strict=True):
                count *= part[rank]
            met = [rank for layer in range(depth) if (rank := ranks[layer % len(ranks)])]
            if met != sorted(met):
                continue
            for before in range(size):
                if not met:
                    ways[before][before] += count
                elif before <= met[0]:
                    ways[before][met[-1]] += count
        return tuple(map(tuple, ways))

    def _counts(self, slot: SlotDomain, context: Context, without: frozenset[str]) -> list[int]:
        """Count the ways to fill one place with a component of each group, of none first."""
        counts = [0] * (len(self.groups) + 1)
        for entry in slot.entries:
            if entry.key not in without:
                counts[self.rank(entry.key)] += entry.count_valid(context)
        return counts

    def _step(self, counts: Sequence[int]) -> Ways:
        """Count the ways of one layer: in a group it stays by a component of that group or of none."""
        size = len(counts)
        ways = [[counts[after] if after >= before else 0 for after in range(size)] for before in range(size)]
        for group in range(1, size):
            ways[group][group] += counts[0]
        return tuple(map(tuple, ways))

    def _identity(self) -> Ways:
        size = len(self.groups) + 1
        return tuple(tuple(int(before == after) for after in range(size)) for before in range(size))


def product(first: Ways, second: Ways) -> Ways:
    """Count the ways of layers that follow each other."""
    size = range(len(first))
    return tuple(tuple(sum(first[i][k] * second[k][j] for k in size) for j in size) for i in size)


def either(first: Ways, second: Ways) -> Ways:
    """Count the ways of layers that are of the one sort or of the other."""
    return tuple(tuple(a + b for a, b in zip(*rows, strict=True)) for rows in zip(first, second, strict=True))


UNORDERED: Final = Order()
"""Of a space that demands no order."""
