"""The search space as strategies see it: load, count, draw, vary.

A space is read from a YAML file or a dictionary, checked once from the outside in, and then holds nothing that could
fail except that its demands may leave next to nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ir.errors import SpaceError, did_you_mean
from searchspaces.architecture import LAYER_SLOTS, Architecture
from searchspaces.checking import Checker, read_order, require_offered, value_axis
from searchspaces.domains import Axis, Choices, Chooser, Context, SlotDomain
from searchspaces.registry import Registry, default_registry
from searchspaces.schema import (
    ConstraintsSection,
    LayerSlotSection,
    PyramidFile,
    SlotSection,
    SpaceFile,
    StageSection,
    parse_space,
)
from searchspaces.signature import Signature
from searchspaces.tree import StageTree, Tree, integer, taken_from
from searchspaces.yaml_source import DataPath, Source, format_path, read_yaml

ZOO = "zoo"  # folder of published architectures, and what their names begin with
DRAW_TRIES = 1000  # whole architectures drawn before a space counts as empty
CAUSAL_TASKS = frozenset(
    {"char_lm", "induction", "mqar", "selective_copy"}
)  # their models are decoders unless the space says otherwise

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Constraint:
    """Limits of a metric that an architecture must keep.

    Attributes:
        metric: `params`, `flops`, `state_bytes` or `latency_ms`.
        minimum: Smallest value allowed, None for no limit.
        maximum: Largest value allowed, None for no limit.
    """

    metric: str
    minimum: float | None = None
    maximum: float | None = None

    def violation(self, value: float) -> str | None:
        """Return what is wrong with a value, None if it is within the limits."""
        if self.maximum is not None and not value <= self.maximum:  # not `>`: NaN violates every limit
            return f"{self.metric} {value:,.6g} is above {self.maximum:,.12g}"
        if self.minimum is not None and not value >= self.minimum:
            return f"{self.metric} {value:,.6g} is below {self.minimum:,.12g}"
        return None

    def __str__(self) -> str:
        low = "" if self.minimum is None else f"{self.minimum:,.12g} <= "
        high = "" if self.maximum is None else f" <= {self.maximum:,.12g}"
        return f"{low}{self.metric}{high}"


@dataclass(frozen=True)
class TrainingDefaults:
    """Training settings that the space suggests; None leaves one to the run."""

    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class Published:
    """What a paper or its code says of the one architecture that a space holds.

    Attributes:
        paper: Authors, year and title.
        url: Where the paper is.
        params: Parameters.
        macs: Multiply-adds of products, convolutions and attention, which most papers print as FLOPs.
        source: Where the two numbers stand.
        note: What is to be said about them.
        deviation: By which share of a printed number, `params` or `macs`, this architecture differs from it.
    """

    paper: str
    url: str
    params: int | None
    macs: float | None
    source: str
    note: str
    deviation: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Space:
    """A search space, checked and ready to draw from; `load_space` makes one from a file.

    Attributes:
        name: Short name.
        description: One sentence.
        task: Key of the task whose data the models learn; `shapes` where the space gives a signature alone.
        signature: That signature; None where the task has one.
        data: Path of the task's data, None for the task's own.
        seq_len: Tokens or times a model reads at once, None for the task's own.
        tree: What may vary.
        constraints: Limits on metrics.
        training: Suggested training settings.
        published: What is published about the architecture of a space that holds one.
        source: File the space was read from, `<dict>` for data from Python.
    """

    name: str
    description: str
    task: str
    signature: Signature | None
    data: str | None
    seq_len: int | None
    tree: Tree
    constraints: tuple[Constraint, ...]
    training: TrainingDefaults
    published: Published | None
    source: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], registry: Registry | None = None) -> Space:
        """Return the space that a dictionary of the same shape as a file describes.

        Args:
            data: What a YAML file would hold.
            registry: Where components come from; the shipped and installed ones by default.

        Raises:
            SpaceError: It is malformed.
        """
        return _build(Source("<dict>", dict(data)), Path.cwd(), registry or default_registry())

    def axes(self) -> tuple[Axis, ...]:
        """Return everything that may vary, top-down; an axis of a layer exists where the depth reaches it."""
        return self.tree.axes(self.tree.largest_depths)

    def size(self) -> int:
        """Count the architectures, exactly: choices that make no difference and invalid combinations are left out.

        A component with more than `domains.MAX_COMBINATIONS` ways to set its options is counted as if all of them
        were valid.
        """
        return self.tree.count()

    def enumerate(self) -> Iterator[Architecture]:
        """Give every valid architecture once; `size` tells how many there are."""
        return self.tree.enumerate()

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Draw an architecture, uniformly on each axis from the top down.

        Raises:
            SpaceError: Nearly nothing in the space is valid; the message names what rules it out.
        """
        return self._draw(lambda axis: int(rng.integers(len(axis))), rng)

    def mutate(self, architecture: Architecture, rng: np.random.Generator) -> Architecture:
        """Change one choice to another value; choices that this brings into play are drawn anew.

        A component that no longer fits, or breaks the order among layers, is drawn anew too. Where nothing else can be
        reached, the architecture comes back as it is.
        """
        old = self.choices(architecture)
        depths = [len(stage.layers) for stage in architecture.model.stages]
        free = [axis for axis in self.tree.axes(depths) if axis.path in old]
        for _ in range(DRAW_TRIES if free else 0):
            target = free[int(rng.integers(len(free)))]
            shift = int(rng.integers(1, len(target)))
            changed = old | {target.path: (old[target.path] + shift) % len(target)}
            child = self.tree.assemble(_inherit((changed,), rng), rng)
            if isinstance(child, Architecture) and child != architecture:
                return child
        return architecture

    def crossover(self, first: Architecture, second: Architecture, rng: np.random.Generator) -> Architecture:
        """Take every choice from one of two parents; choices that neither made are drawn anew."""
        return self._draw(_inherit((self.choices(first), self.choices(second)), rng), rng)

    def smallest(self) -> Architecture:
        """Return the architecture at the low end of every axis, or the closest valid one."""
        return self._closest(lambda length: 0)

    def centroid(self) -> Architecture:
        """Return the architecture in the middle of every axis, or the closest valid one."""
        return self._closest(lambda length: length // 2)

    def largest(self) -> Architecture:
        """Return the architecture at the high end of every axis, or the closest valid one."""
        return self._closest(lambda length: length - 1)

    def architecture(self, data: Mapping[str, Any]) -> Architecture:
        """Return the architecture that `Architecture.to_dict` wrote, checked to lie in this space.

        Raises:
            InputError: It is malformed, or the space does not contain it.
        """
        architecture = Architecture.from_dict(data)
        reason = self.is_valid(architecture)
        if reason:
            raise self._foreign(reason)
        return architecture

    def is_valid(self, architecture: Architecture) -> str | None:
        """Return why an architecture is not in the space, None if it is."""
        found = self.tree.find(architecture.model)
        if isinstance(found, str):
            return found
        rebuilt = self.tree.assemble(taken_from(found), None)
        if isinstance(rebuilt, str):
            return rebuilt
        return None if rebuilt == architecture else "a stem, head or macro that the space does not name"

    def choices(self, architecture: Architecture) -> Choices:
        """Return the index that an architecture has on each of its axes, by path.

        Raises:
            SpaceError: The space does not contain it.
        """
        found = self.tree.find(architecture.model)
        if isinstance(found, str):
            raise self._foreign(found)
        return found

    def __str__(self) -> str:
        tree = self.tree
        offered = {axis.path: axis for slot in tree.slots for place in slot.offered() for axis in place.axes}
        varying = [axis for axis in (*tree.sizes, *offered.values()) if len(axis) > 1]
        width = max((len(axis.path) for axis in varying), default=0)
        lines = [
            f"{self.name}: {self.description}".removesuffix(": "),
            f"task {self.task}, {'causal decoder' if tree.causal else 'bidirectional encoder'}",
            f"{_counted(self.size())} architectures",
            *(f"  {axis.path:{width}}  {_listed(axis)}" for axis in varying),
            *(f"  {slot.path} is drawn for each layer" for slot in dict.fromkeys(tree.slots) if slot.per_layer),
            *([f"  at least one of {', '.join(tree.required)}"] if tree.required else []),
            *([f"  {tree.order}"] if tree.order.groups else []),
            *(f"  {constraint}" for constraint in self.constraints),
        ]
        return "\n".join(lines)

    def _draw(self, choose: Chooser, rng: np.random.Generator) -> Architecture:
        """Assemble until an architecture is valid; where none is, tell what rules most of them out."""
        reasons: Counter[str] = Counter()
        for _ in range(DRAW_TRIES):
            built = self.tree.assemble(choose, rng)
            if isinstance(built, Architecture):
                return built
            reasons[built] += 1
        reason, count = reasons.most_common(1)[0]
        raise SpaceError(
            f"none of {DRAW_TRIES} architectures drawn from `{self.name}` is valid",
            where=self.source,
            expected="a space where most architectures are valid",
            found=f"{count} of {DRAW_TRIES} fail: {reason}",
            hint="loosen what rules them out, or offer values that fit together",
        )

    def _closest(self, prefer: Callable[[int], int]) -> Architecture:
        return self.tree.closest(prefer) or self.sample(np.random.default_rng(0))

    def _foreign(self, reason: str) -> SpaceError:
        return SpaceError(
            f"the architecture is not in the space `{self.name}`",
            where=self.source,
            expected="a value on every axis of the space",
            found=reason,
            hint="was the space edited after the architecture was drawn?",
        )


def load_space(path_or_name: str | Path, registry: Registry | None = None) -> Space:
    """Load a search space from a file, or a shipped one by its name.

    Args:
        path_or_name: A path of a YAML file, or a name such as `tiny_lm`.
        registry: Where components come from; the shipped and installed ones by default.

    Raises:
        SpaceError: There is no such space, or it is malformed; the message tells file and line.
    """
    path = Path(path_or_name)
    is_name = path.name == path_or_name or path.parts[:-1] == (ZOO,)
    if isinstance(path_or_name, str) and not path.suffix and not path.exists() and is_name:
        path = _shipped(path_or_name)
    return _build(read_yaml(path), path.parent, registry or default_registry())


def shipped_spaces() -> dict[str, Path]:
    """Return the files of the shipped search spaces by name."""
    paths = [path for pattern in ("*.yaml", "zoo/*.yaml") for path in sorted(_HERE.glob(pattern))]
    return {str(path.relative_to(_HERE).with_suffix("")): path for path in paths}


def _shipped(name: str) -> Path:
    spaces = shipped_spaces()
    if name in spaces:
        return spaces[name]
    raise SpaceError(
        f"there is no search space `{name}`",
        where=name,
        expected=f"a YAML file, or one of {', '.join(spaces)}",
        found="neither a file nor a shipped space of that name",
        hint=did_you_mean(name, spaces) or "give the path of a YAML file",
    )


def _build(source: Source, folder: Path, registry: Registry) -> Space:
    """Check a source from the outside in and make the space."""
    file = parse_space(source)
    limits = ((metric, getattr(file.constraints, metric)) for metric in ConstraintsSection.METRICS)
    given = file.model.signature
    published = file.published
    return Space(
        name=file.name,
        description=file.description,
        task=file.model.task,
        signature=given.signature() if given else None,
        data=_data_path(file.model.data, folder, source),
        seq_len=file.model.seq_len,
        tree=_tree(file, source, registry),
        constraints=tuple(Constraint(metric, bound.min, bound.max) for metric, bound in limits if bound),
        training=TrainingDefaults(file.training.steps, file.training.batch_size, file.training.learning_rate),
        published=Published(**published.model_dump()) if published else None,
        source=source.label,
    )


def _tree(file: SpaceFile | PyramidFile, source: Source, registry: Registry) -> Tree:
    model = file.model
    causal = model.task in CAUSAL_TASKS if model.causal is None else model.causal
    checker = Checker(source, registry, causal)
    whole = ("norm", "final_norm", "stem", "head", "conditioner", "macro")
    slots = {name: getattr(model, name) for name in whole}
    paths: dict[int, DataPath] = {}

    def slot(kind: str, section: SlotSection | LayerSlotSection, path: DataPath) -> SlotDomain:
        domain = checker.slot(kind, section, path)
        paths[id(domain)] = path
        return domain

    position = slot("position", model.position, ("model", "position"))
    model_slots = tuple(
        slot(_KIND_OF_SLOT.get(name, name), section, ("model", name)) for name, section in slots.items() if section
    )
    if isinstance(file, PyramidFile):
        shared = {
            name: slot(_KIND_OF_SLOT.get(name, name), section, ("block", name))
            for name in LAYER_SLOTS
            if (section := getattr(file.block, name)) is not None
        }
        stages = tuple(
            _stage(section, ("stages", index), shared, slot, source) for index, section in enumerate(file.stages)
        )
    else:
        sections = [(name, getattr(file.block, name)) for name in LAYER_SLOTS]
        block = tuple(slot(_KIND_OF_SLOT.get(name, name), section, ("block", name)) for name, section in sections)
        d_model, depth = value_axis("model.d_model", file.model.d_model), value_axis("model.depth", file.model.depth)
        stages = (StageTree(d_model, depth, None, block),)
    mixers = [domain for stage in stages for domain in stage.block_slots[1:3]]
    required = require_offered(file.constraints.at_least_one_of or [], mixers, source)
    order = read_order(file.constraints.order or [], [stage.block_slots for stage in stages], source)
    tree = Tree(causal, position, model_slots, stages, required, order)
    for stage in stages:
        positions = [(integer(width), entry.key) for width in stage.d_model.values for entry in position.entries]
        contexts = [Context(width, causal, key) for width, key in positions]
        for domain in stage.slots if stage is not stages[0] else (position, *model_slots, *stage.slots):
            checker.check_fit(domain, contexts, paths[id(domain)])
    return tree


_KIND_OF_SLOT = {"wiring": "block", "final_norm": "norm"}


def _stage(
    section: StageSection,
    path: DataPath,
    shared: Mapping[str, SlotDomain],
    slot: Callable[[str, SlotSection | LayerSlotSection, DataPath], SlotDomain],
    source: Source,
) -> StageTree:
    """Return what may vary in a stage; what it leaves open is shared by all stages that do."""
    block: list[SlotDomain] = []
    for name in LAYER_SLOTS:
        own = getattr(section.block, name)
        if own is None and name in shared:
            block.append(shared[name])
            continue
        if own is None and name in _USUAL:
            own = LayerSlotSection.model_validate({"choice": [{_USUAL[name]: {}}]})
        if own is None:
            raise source.error(
                f"the stage has no `{name}`",
                path,
                expected=f"`{name}:` under `block` here, or under `block` at the top for all stages",
                found="neither",
                hint=f"add `block: {{{name}: ...}}`",
            )
        block.append(slot(_KIND_OF_SLOT.get(name, name), own, (*path, "block", name)))
    first = path[-1] == 0
    if (section.transition is None) != first:
        raise source.error(
            "the stem leads to the first stage and a transition to each other one",
            path,
            expected="no `transition`" if first else "a `transition`",
            found="one" if first else "none",
            hint="remove it" if first else "add `transition: conv_downsample`",
        )
    transition = slot("transition", section.transition, (*path, "transition")) if section.transition else None
    width = value_axis(f"{format_path(path)}.d_model", section.d_model)
    return StageTree(width, value_axis(f"{format_path(path)}.depth", section.depth), transition, tuple(block))


_USUAL = {"wiring": "pre_norm", "reducer": "none"}


def _data_path(data: str | None, folder: Path, source: Source) -> str | None:
    """Return the path of the task's data, which a file gives relative to itself."""
    if data is None:
        return None
    path = folder / Path(data).expanduser()
    if path.is_file() and os.access(path, os.R_OK):
        return str(path)
    raise source.error(
        "cannot read the data",
        ("model", "data"),
        expected="a readable file; a relative path starts from the folder of the space",
        found=f"`{data}`, {'a folder' if path.is_dir() else 'no such file' if not path.exists() else 'no permission'}",
        hint="check the path, or remove `data` to use the task's own",
    )


def _inherit(parents: tuple[Choices, ...], rng: np.random.Generator) -> Chooser:
    """Return a chooser that takes the choice of a parent that made it, or draws."""

    def choose(axis: Axis) -> int:
        offers = [parent[axis.path] for parent in parents if axis.path in parent]
        return offers[int(rng.integers(len(offers)))] if offers else int(rng.integers(len(axis)))

    return choose


def _counted(count: int) -> str:
    return f"{count:,}" if count < 10**9 else f"about 10^{len(str(count)) - 1}"


def _listed(axis: Axis) -> str:
    if len(axis) <= 8:
        return ", ".join(str(value) for value in axis.values)
    return f"{axis.values[0]} to {axis.values[-1]}, {len(axis)} values"
