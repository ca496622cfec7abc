"""Which architectures one training step of a supernet visits: the largest, the smallest, and random ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ir.errors import InputError
from searchspaces.architecture import Architecture
from searchspaces.domains import Axis, Chooser
from searchspaces.space import DRAW_TRIES, Space


@dataclass(frozen=True, kw_only=True)
class Sandwich:
    """How a step is made up (Yu and Huang 2019, arXiv 1903.05134; Yu et al. 2020, BigNAS, arXiv 2003.11142).

    Attributes:
        random: Random architectures in each step, besides the largest and the smallest.
        distill: Share of the loss of all but the largest that is the distance from the largest's output; the rest is
            the task's own loss.
        shrink: Share of the training over which smaller sizes are let in, from the largest down; 0 lets all in at once.

    Raises:
        InputError: A number out of range.
    """

    random: int = 2
    distill: float = 0.5
    shrink: float = 0.0

    def __post_init__(self) -> None:
        if type(self.random) is not int or self.random < 0:
            raise InputError(
                "bad sandwich", where="random", expected="an integer of at least 0", found=repr(self.random)
            )
        for name in ("distill", "shrink"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError("bad sandwich", where=name, expected="a number from 0 to 1", found=repr(value))

    @property
    def passes(self) -> int:
        """Forward passes of one step."""
        return self.random + 2

    def draw(self, space: Space, rng: np.random.Generator, fraction: float) -> list[Architecture]:
        """Draw the architectures of a step, the largest first and the smallest second.

        Args:
            space: The space.
            rng: Generator of this step alone.
            fraction: Part of the training that is done, 0 to 1.
        """
        share = min(1.0, fraction / self.shrink) if self.shrink else 1.0
        drawn = [draw_largest(space, rng), _draw(space, lambda axis: _floor(axis, share), rng)]
        return drawn + [_draw(space, _random_above(rng, share), rng) for _ in range(self.random)]


def draw_largest(space: Space, rng: np.random.Generator) -> Architecture:
    """Draw an architecture whose widths, depths and other sizes are the largest; kinds of components are random.

    Kinds have no order, so that a fixed one would leave the others untaught.
    """
    return _draw(space, lambda axis: len(axis) - 1, rng)


def is_size(axis: Axis) -> bool:
    """Whether a choice is between numbers, of which one is the largest."""
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in axis.values)


def _floor(axis: Axis, share: float) -> int:
    """Smallest index of a size that is let in when a share of them is."""
    return math.ceil((1 - share) * (len(axis) - 1))


def _random_above(rng: np.random.Generator, share: float) -> Chooser:
    return lambda axis: int(rng.integers(_floor(axis, share), len(axis)))


def _draw(space: Space, size: Chooser, rng: np.random.Generator) -> Architecture:
    """Draw an architecture: sizes as a function says, kinds at random; sizes that do not fit are drawn anew."""

    def choose(axis: Axis) -> int:
        return size(axis) if is_size(axis) else int(rng.integers(len(axis)))

    for _ in range(DRAW_TRIES):
        built = space.tree.assemble(choose, rng)
        if isinstance(built, Architecture):
            return built
    return space.sample(rng)  # raises, and says what rules everything out
