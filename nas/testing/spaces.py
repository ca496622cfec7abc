"""A search space small enough to count by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Point:
    """An architecture that is only its choices."""

    choices: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the point as JSON."""
        return {"choices": list(self.choices)}


@dataclass(frozen=True)
class Grid:
    """Points of a grid, each axis a choice.

    Attributes:
        sizes: Number of choices on each axis.
    """

    sizes: tuple[int, ...] = (8, 8, 8, 8)

    def size(self) -> int:
        """Count the points."""
        return math.prod(self.sizes)

    def places(self) -> tuple[int, ...]:
        """Return how many ways there are at each place of a point."""
        return self.sizes

    def assemble(self, ways: Sequence[int]) -> Point:
        """Return the point of one way for each place."""
        return Point(tuple(ways))

    def sample(self, rng: np.random.Generator) -> Point:
        """Draw a point."""
        return Point(tuple(int(rng.integers(size)) for size in self.sizes))

    def mutate(self, architecture: Point, rng: np.random.Generator) -> Point:
        """Change one choice."""
        axis = int(rng.integers(len(self.sizes)))
        choices = list(architecture.choices)
        if self.sizes[axis] > 1:
            choices[axis] = (choices[axis] + int(rng.integers(1, self.sizes[axis]))) % self.sizes[axis]
        return replace(architecture, choices=tuple(choices))

    def crossover(self, first: Point, second: Point, rng: np.random.Generator) -> Point:
        """Take each choice from one of two points."""
        pairs = zip(first.choices, second.choices, strict=True)
        return Point(tuple(pair[int(rng.integers(2))] for pair in pairs))

    def enumerate(self) -> Iterator[Point]:
        """Give every point once."""
        for choices in itertools.product(*(range(size) for size in self.sizes)):
            yield Point(choices)

    def architecture(self, data: Mapping[str, Any]) -> Point:
        """Return the point that `Point.to_dict` wrote."""
        return Point(tuple(data["choices"]))
