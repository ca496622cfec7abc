"""Which memory each value between kernels lies in, decided when a model is compiled.

A value lives from the kernel that makes it to the last one that reads it. Values that never live at once share a
storage: largest value first, each takes the smallest storage that is free all its life, of equal ones the one freed
last, which is still in the cache. A storage is then as large as its first value.

Outputs get memory of their own, since the caller keeps them, and so do inputs, which the caller brings; an output that
a kernel writes over an input, as the new rows of a cache, lies there. Scratch memory of a running kernel, such as the
half products of a fast multiplication, is not in the plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from codegen.archive import ALIGNMENT_BYTES
from codegen.kernels.base import storage_dtype
from codegen.selection.select import aliases
from codegen.selection.state import KernelCall
from ir.graph import Graph, Value
from ir.types import TensorType


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one call of a compiled model.

    Attributes:
        storages: Bytes of each storage.
        places: Storage of each value between kernels, by its position in `storages`.
        in_place: Values that kernels write over another value, each with that one.
        output_bytes: Bytes of the outputs that kernels make.
        peak_bytes: Most bytes of values between kernels and outputs alive at once; no plan needs less.
    """

    storages: tuple[int, ...]
    places: Mapping[Value, int]
    in_place: Mapping[Value, Value]
    output_bytes: int
    peak_bytes: int

    @property
    def starts(self) -> dict[Value, int]:
        """Byte at which each value between kernels begins where the storages lie one behind the other, aligned."""
        ends = list(itertools.accumulate((aligned(size_bytes) for size_bytes in self.storages), initial=0))
        return {value: ends[storage] for value, storage in self.places.items()}

    @property
    def memory_bytes(self) -> int:
        """Bytes of all storages, one behind the other, aligned."""
        return sum(aligned(size_bytes) for size_bytes in self.storages)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all storages and outputs."""
        return sum(self.storages) + self.output_bytes

    def describe(self, weights: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Return what an artifact records: bytes of its weights, of its activations, and the least these could be."""
        return {
            "weight_bytes": sum(array.nbytes for array in weights.values()),
            "activation_bytes": self.activation_bytes,
            "peak_activation_bytes": self.peak_bytes,
        }


def aligned(size_bytes: int) -> int:
    """Round up to where the next array may begin."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class _Life:
    """A value with the first and the last kernel call that it is needed for."""

    value: Value
    size_bytes: int
    first: int
    last: int

    def meets(self, other: _Life) -> bool:
        """Whether both are needed for one call."""
        return self.first <= other.last and other.first <= self.last


def plan_memory(graph: Graph, calls: Sequence[KernelCall]) -> MemoryPlan:
    """Plan the memory of kernel calls that run in their order."""
    alias = aliases(graph, calls)
    outputs = {alias.get(value, value) for _, value in graph.outputs}
    in_place = {
        call.results[0]: alias.get(base, base)
        for call in calls
        if call.kernel.writes_over is not None and isinstance(base := call.operands[call.kernel.writes_over], Value)
    }
    lives = [life for life in _lives(calls, alias, outputs) if life.value not in in_place]
    places, storages = _share([life for life in lives if life.value not in outputs])
    return MemoryPlan(
        storages=storages,
        places=places,
        in_place=in_place,
        output_bytes=sum(life.size_bytes for life in lives if life.value in outputs),
        peak_bytes=max((_alive_bytes(lives, call) for call in range(len(calls))), default=0),
    )


def _lives(calls: Sequence[KernelCall], alias: Mapping[Value, Value], outputs: set[Value]) -> list[_Life]:
    last = {
        alias.get(operand, operand): position
        for position, call in enumerate(calls)
        for operand in call.operands
        if isinstance(operand, Value)
    }
    last.update(dict.fromkeys(outputs, len(calls)))
    return [
        _Life(value, _size_bytes(kind), position, last.get(value, position))
        for position, call in enumerate(calls)
        for value, kind in zip(call.results, call.kernel.outputs, strict=True)
    ]


def _share(lives: Sequence[_Life]) -> tuple[dict[Value, int], tuple[int, ...]]:
    places: dict[Value, int] = {}
    tenants: list[list[_Life]] = []
    for life in sorted(lives, key=lambda life: (-life.size_bytes, life.first)):
        free = [place for place, those in enumerate(tenants) if not any(life.meets(other) for other in those)]

        def fitness(place: int, life: _Life = life) -> tuple[int, int]:
            return tenants[place][0].size_bytes, life.first - max(
                (other.last for other in tenants[place] if other.last < life.first), default=-1
            )

        place = min(free, key=fitness) if free else len(tenants)
        if not free:
            tenants.append([])
        tenants[place].append(life)
        places[life.value] = place
    return places, tuple(those[0].size_bytes for those in tenants)


def _alive_bytes(lives: Sequence[_Life], call: int) -> int:
    return sum(life.size_bytes for life in lives if life.first <= call <= life.last)


def _size_bytes(kind: TensorType) -> int:
    return kind.size * np.dtype(storage_dtype(kind.dtype)).itemsize
