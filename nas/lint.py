"""What is wrong with a search space: choices that build the same model, values that no model has, demands few meet.

report = lint(load_space("tiny_lm"), signature)
print(report.distinct, report.ignored)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ir.errors import GraphError, InputError, SpaceError
from searchspaces.architecture import Architecture
from searchspaces.domains import MAX_COMBINATIONS, Axis, Context, SlotDomain
from searchspaces.signature import Signature
from searchspaces.space import Space
from searchspaces.tree import integer, taken_from

_Z: Final = 1.96  # a 95 % interval
_LEAST_TRIED: Final = 8  # single changes of a choice before it is said to make no difference
_LAYER: Final = re.compile(r"\[\d+\]")


@dataclass(frozen=True)
class Share:
    """A share of what was looked at.

    Attributes:
        value: The share, 0 to 1.
        interval: Where it lies with 95 % confidence; the value itself where everything was looked at.
        of: How many were looked at.
    """

    value: float
    interval: tuple[float, float]
    of: int


@dataclass(frozen=True)
class Choice:
    """Values of a choice.

    Attributes:
        path: Where it is, layers left out.
        values: The values.
        tried: Single changes of this choice that were tried, 0 where that is not how it was found.
    """

    path: str
    values: tuple[Any, ...]
    tried: int = 0


@dataclass(frozen=True)
class Lint:
    """What was found.

    Attributes:
        counted: Architectures of the space.
        is_exact: Whether all of them were built; else a sample was.
        built: How many were built.
        distinct: Different models, by canonical hash.
        distinct_interval: Where that lies; for a sample, 95 % confidence.
        unbuildable: Share that cannot be built for the task.
        infeasible: Share that breaks a constraint which is counted.
        broken: Share that breaks each constraint.
        unreachable: Values that no architecture has.
        ignored: Choices that never changed the model where only they were changed.
        unchecked: Constraints that need a measurement.
    """

    counted: int
    is_exact: bool
    built: int
    distinct: float
    distinct_interval: tuple[float, float]
    unbuildable: Share
    infeasible: Share
    broken: Mapping[str, Share]
    unreachable: tuple[Choice, ...]
    ignored: tuple[Choice, ...]
    unchecked: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether no choice is idle and something is feasible."""
        return not (self.unreachable or self.ignored) and self.infeasible.value < 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self) | {"clean": self.is_clean}


def lint(space: Space, signature: Signature, *, samples: int = 200, seed: int = 0) -> Lint:
    """Look for idle choices and demands that few architectures meet.

    A space of at most `samples` architectures is built whole. Of a larger one so many are drawn, as `Space.sample`
    draws, and around a tenth of those every single change is built too. How many models are alike is taken from how
    many single changes leave a model as it is, as if choices without effect were independent of each other.

    Args:
        space: The space.
        signature: Inputs and outputs of its task.
        samples: Architectures to build.
        seed: Seed of the draws.

    Raises:
        SpaceError: Nearly nothing in the space is valid.
    """
    models = _Models(space, signature)
    counted = space.size()
    rng = np.random.default_rng(seed)
    is_exact = counted <= samples
    drawn = list(space.enumerate()) if is_exact else [space.sample(rng) for _ in range(samples)]
    hashes = [models.hash(architecture) for architecture in drawn]
    neighbourhoods = _Neighbourhoods(models)
    for architecture in drawn if is_exact else drawn[:: max(1, min(10, samples // 4))]:
        neighbourhoods.add(architecture)
    good = [architecture for architecture, hash_ in zip(drawn, hashes, strict=True) if hash_]
    unbuildable = _share([hash_ is None for hash_ in hashes], is_exact)
    broken = {str(item): [_breaks(item, models.counts(good_one)) for good_one in good] for item in models.constraints}
    any_broken = [any(column) for column in zip(*broken.values(), strict=True)] if broken else [False] * len(good)
    exact = float(len({hash_ for hash_ in hashes if hash_}))
    distinct, interval = (exact, (exact, exact)) if is_exact else neighbourhoods.distinct(counted)
    return Lint(
        counted=counted,
        is_exact=is_exact,
        built=len(drawn),
        distinct=distinct,
        distinct_interval=interval,
        unbuildable=unbuildable,
        infeasible=_share(any_broken, is_exact),
        broken={name: _share(column, is_exact) for name, column in broken.items()},
        unreachable=tuple(unreachable(space)),
        ignored=neighbourhoods.ignored(),
        unchecked=tuple(str(item) for item in space.constraints if item not in models.constraints),
    )


def unreachable(space: Space) -> list[Choice]:
    """Return the values that no valid architecture has; exact, but for components with a great many options."""
    tree = space.tree
    fitting: dict[int, set[Context]] = defaultdict(set)
    for entry in tree.position.entries:
        widths = [_widths(space, stage, entry.key) for stage in range(len(tree.stages))]
        if all(widths):
            for stage, fits in enumerate(widths):
                fitting[stage] |= {Context(width, tree.causal, entry.key) for width in fits}
    found: dict[str, Choice] = {}
    for index, stage in enumerate(tree.stages):
        reached = {context.d_model for context in fitting[index]}
        missing = tuple(width for width in stage.d_model.values if width not in reached)
        found |= {stage.d_model.path: Choice(stage.d_model.path, missing)} if missing else {}
        slots = (tree.position, *tree.model_slots, *stage.slots) if index == 0 else stage.slots
        for slot in slots:
            found |= {choice.path: choice for choice in _unreachable_of(slot, fitting[index])}
    return list(found.values())


def _widths(space: Space, stage: int, position: str) -> list[int]:
    """Return the widths of a stage at which every slot can be filled."""
    tree = space.tree
    found: list[int] = []
    for value in tree.stages[stage].d_model.values:
        context = Context(integer(value), tree.causal, position)
        slots = (tree.position, *tree.model_slots) if stage == 0 else ()
        if all(any(part.count_valid(context) for part in (slot.pattern or (slot,))) for slot in slots) and _has_stage(
            space, stage, context
        ):
            found.append(integer(value))
    return found


def _has_stage(space: Space, stage: int, context: Context) -> bool:
    tree = space.tree.stages[stage]
    depth = min(integer(value) for value in tree.depth.values)
    ways = [slot.count_valid(context, depth) for slot in tree.block_slots]
    return all(ways) and (tree.transition is None or tree.transition.count_valid(context) > 0)


def _unreachable_of(slot: SlotDomain, contexts: Iterable[Context]) -> list[Choice]:
    if slot.pattern:
        return [choice for part in slot.pattern for choice in _unreachable_of(part, contexts)]
    found: list[Choice] = []
    missing: list[str] = []
    for entry in slot.entries:
        if entry.combinations > MAX_COMBINATIONS:
            continue
        fits = [context for context in contexts if slot.kind != "position" or context.position == entry.key]
        every = itertools.product(*(range(len(values)) for _, values in entry.free))
        valid = [indices for indices in every if any(entry.problem(indices, context) is None for context in fits)]
        if not valid:
            missing.append(entry.label)
            continue
        for place, (name, values) in enumerate(entry.free):
            reached = {indices[place] for indices in valid}
            idle = tuple(value for index, value in enumerate(values) if index not in reached)
            found += [Choice(f"{slot.path}.{entry.label}.{name}", idle)] if idle else []
    return [*([Choice(slot.path, tuple(missing))] if missing else []), *found]


class _Models:
    """Models of a space, each built once."""

    def __init__(self, space: Space, signature: Signature) -> None:
        self.space = space
        self.constraints = tuple(item for item in space.constraints if item.metric != "latency_ms")
        self._signature = signature
        self._hashes: dict[Architecture, str | None] = {}

    def hash(self, architecture: Architecture) -> str | None:
        """Return the canonical hash, None where the model cannot be built."""
        if architecture not in self._hashes:
            try:
                self._hashes[architecture] = architecture.canonical_hash(self._signature)
            except (GraphError, SpaceError, InputError):
                self._hashes[architecture] = None
        return self._hashes[architecture]

    def counts(self, architecture: Architecture) -> dict[str, float]:
        """Return what the space's constraints bound; state is NaN where the model does not stream."""
        from ir.cost import profile, state_bytes

        wanted = {item.metric for item in self.constraints}
        found: dict[str, float] = {}
        if wanted & {"params", "flops"}:
            cost = profile(architecture.graph(self._signature))
            found |= {"params": cost.params, "flops": cost.flops}
        if "state_bytes" in wanted:
            length = self._signature.positions
            try:
                found["state_bytes"] = state_bytes(architecture.graph(self._signature, mode="step", max_len=length))
            except (GraphError, InputError):
                found["state_bytes"] = math.nan
        return found


class _Neighbourhoods:
    """Single changes of architectures, and which of them leave the model as it is."""

    def __init__(self, models: _Models) -> None:
        self._models = models
        self._tried: dict[str, int] = defaultdict(int)
        self._same: dict[str, int] = defaultdict(int)
        self._values: dict[str, tuple[Any, ...]] = {}
        self._ones_of: list[float] = []

    def add(self, architecture: Architecture) -> None:
        """Try every single change of an architecture that leaves it complete."""
        hash_ = self._models.hash(architecture)
        if hash_ is None:
            return
        tree = self._models.space.tree
        choices = self._models.space.choices(architecture)
        alike = 1
        for axis in tree.axes([len(stage.layers) for stage in architecture.model.stages]):
            same = [self._try(axis, index, choices, hash_) for index in range(len(axis)) if axis.path in choices]
            alike *= 1 + sum(same)
        self._ones_of.append(1.0 / alike)

    def distinct(self, counted: int) -> tuple[float, tuple[float, float]]:
        """Estimate how many models differ, with a 95 % interval."""
        ones = np.array(self._ones_of)
        if len(ones) == 0:
            return 0.0, (0.0, float(counted))
        mean = float(ones.mean())
        # Where no change of any was idle, a share of up to 3/n may still be (the rule of three).
        spread = _Z * float(ones.std(ddof=1)) / math.sqrt(len(ones)) if len(ones) > 1 else mean
        low = min(mean - spread, 1.0 - 3.0 / len(ones)) if spread == 0 and mean == 1.0 else mean - spread
        return mean * counted, (max(0.0, low) * counted, min(1.0, mean + spread) * counted)

    def ignored(self) -> tuple[Choice, ...]:
        """Return the choices that never made a difference."""
        paths = [path for path, count in self._tried.items() if count == self._same[path] and count >= _LEAST_TRIED]
        return tuple(Choice(path, self._values[path], self._tried[path]) for path in paths)

    def _try(self, axis: Axis, index: int, choices: dict[str, int], hash_: str) -> bool:
        if choices[axis.path] == index:
            return False
        changed = choices | {axis.path: index}
        try:
            built = self._models.space.tree.assemble(taken_from(changed), None)
        except KeyError:  # the change calls for choices that were not made
            return False
        other = self._models.hash(built) if isinstance(built, Architecture) else None
        if other is None:
            return False
        path = _LAYER.sub("", axis.path)
        self._tried[path] += 1
        self._same[path] += other == hash_
        self._values[path] = tuple(axis.values)
        return other == hash_


def _breaks(constraint: Any, counts: Mapping[str, float]) -> bool:
    return constraint.violation(counts[constraint.metric]) is not None


def _share(claims: list[bool], is_exact: bool) -> Share:
    """Return the share of claims that hold, with Wilson's interval where they are a sample."""
    count, held = len(claims), sum(claims)
    if count == 0:
        return Share(0.0, (0.0, 0.0 if is_exact else 1.0), 0)
    value = held / count
    if is_exact:
        return Share(value, (value, value), count)
    middle = (value + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * math.sqrt(value * (1 - value) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    return Share(value, (max(0.0, middle - half), min(1.0, middle + half)), count)
