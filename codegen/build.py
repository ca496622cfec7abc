"""One library of some functions: the same kernels and the same weights once, whichever functions use them.

Runs in a worker process, as `codegen.lower` does.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from codegen import lower
from codegen._tvm import relax, tvm
from codegen.cache import LibraryCache
from codegen.cross import linker, run_library, why_not_run
from codegen.kernels.base import Array, storage_dtype
from codegen.lower import Lowered
from codegen.memory import plan_memory
from codegen.packing import Layouts, PackedWeights
from codegen.targets.base import Target
from codegen.tuning import TuningDatabase
from ir.graph import Graph
from ir.hashing import canonical_hash

Parts: TypeAlias = Mapping[str, tuple[Lowered, PackedWeights]]
"""Functions as kernels, with their weights in the order in which they are passed."""
_COMPARED: Final = 64
"""Numbers at the start of an array that tell most arrays apart."""


@dataclass(frozen=True)
class BuiltFunction:
    """One function of a library.

    Attributes:
        weights: Names of the arrays that it takes after its inputs, in order.
        kernels: One record a kernel call, see `lower.describe`.
        memory: Bytes of weights and activations, see `MemoryPlan.describe`.
        graph_hash: `canonical_hash` of what it computes.
    """

    weights: Sequence[str]
    kernels: Sequence[Mapping[str, Any]]
    memory: Mapping[str, int]
    graph_hash: str


@dataclass(frozen=True)
class BuiltModel:
    """A library with its functions and the weights of all of them.

    Attributes:
        library: Bytes of the shared library.
        weights: Arrays by name.
        functions: Functions by name.
        extras: Further members of an artifact, such as sources of kernels.
    """

    library: bytes
    weights: Mapping[str, Array]
    functions: Mapping[str, BuiltFunction]
    extras: Mapping[str, bytes] = field(default_factory=dict[str, bytes])


def build_and_run(
    graphs: Mapping[str, Graph],
    params: Mapping[str, Array],
    target: Target,
    database: TuningDatabase,
    inputs: Mapping[str, Mapping[str, Array]],
) -> tuple[BuiltModel, dict[str, dict[str, Array]] | None]:
    """Generate one library of graphs that share parameters, and run each function once.

    Returns:
        What was built, and the outputs by function and name; None where the code cannot be run here.

    Raises:
        CompileError: A node has no kernel, or TVM or the linker refuses.
        TargetUnavailable: There is no cross compiler.
    """
    if target.is_foreign:
        linker(target)  # rather now than after the work
    built = build(graphs, params, target, database)
    if target.is_foreign:
        return built, None if why_not_run(target) else _run_elsewhere(built, graphs, inputs, target)
    return built, _run_here(built, graphs, inputs)


def build(
    graphs: Mapping[str, Graph], params: Mapping[str, Array], target: Target, database: TuningDatabase
) -> BuiltModel:
    """Generate one library of graphs, or take it from the cache beside the database."""
    parts, key = lower_functions(graphs, params, target, database)
    cache = LibraryCache(database.path.parent / "libraries")
    library = cache.get(key)
    if library is None:
        library = lower.make_library(parts, target)
        cache.put(key, library)
    weights, functions = SharedWeights(), dict[str, BuiltFunction]()
    for name, (lowered, packed) in parts.items():
        names = weights.add_all(packed.arrays)
        memory = plan_memory(lowered.graph, lowered.calls).describe(weights.of(names))
        graph_hash = canonical_hash(graphs[name])
        functions[name] = BuiltFunction(tuple(names.values()), lower.describe(lowered), memory, graph_hash)
    return BuiltModel(library, weights.arrays, functions)


def lower_functions(
    graphs: Mapping[str, Graph], params: Mapping[str, Array], target: Target, database: TuningDatabase
) -> tuple[Parts, str]:
    """Choose kernels of graphs that share parameters and pack their weights, alike in all of them.

    Returns:
        The functions by name, and the key of a library of them.

    Raises:
        CompileError: A node has no kernel.
    """
    layouts = Layouts(params, target)
    parts: dict[str, tuple[Lowered, PackedWeights]] = {}
    keys: list[tuple[str, str]] = []
    for name, graph in graphs.items():
        lowered = layouts.fit(lower.in_place(lower.lower(graph, target, database), target))
        packed = PackedWeights(lowered, params, target)
        keys.append((name, lower.program(lowered, packed).key(target)))
        layouts.remember(lowered, packed)
        parts[name] = lowered, packed
    return parts, hashlib.sha256(json.dumps(keys).encode()).hexdigest()


class SharedWeights:
    """Arrays by name, equal ones once."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        self._alike: dict[tuple[str, tuple[int, ...], bytes], list[str]] = {}

    def add_all(self, arrays: Mapping[str, Array]) -> dict[str, str]:
        """Add the arrays of a function, in order; return by its name there the name of each here."""
        return {own: self._add(own, array) for own, array in arrays.items()}

    def of(self, names: Mapping[str, str]) -> dict[str, Array]:
        """Return what a function reads, as `add_all` named it."""
        return {name: self.arrays[name] for name in names.values()}

    def _add(self, name: str, array: Array) -> str:
        """Return the name of an array, under its own name's last part and the next number where it is new."""
        start = array.reshape(-1)[:_COMPARED].tobytes()
        alike = self._alike.setdefault((array.dtype.name, array.shape, start), [])
        for known in alike:
            if np.array_equal(self.arrays[known], array):
                return known
        alike.append(f"{len(self.arrays)}.{name.partition('.')[2]}")
        self.arrays[alike[-1]] = array
        return alike[-1]


def _run_here(
    built: BuiltModel, graphs: Mapping[str, Graph], inputs: Mapping[str, Mapping[str, Array]]
) -> dict[str, dict[str, Array]]:
    with tempfile.TemporaryDirectory(prefix="nas-") as folder:
        path = Path(folder) / "library.so"
        path.write_bytes(built.library)
        machine = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    # The code may end this process: the file that it was loaded from is gone by then.
    found: dict[str, dict[str, Array]] = {}
    for name, graph in graphs.items():
        result = machine[name](*(tvm.runtime.tensor(array) for array in _arguments(built, name, graph, inputs[name])))
        tensors = [result] if len(graph.outputs) == 1 else list(result)
        found[name] = {key: tensor.numpy() for (key, _), tensor in zip(graph.outputs, tensors, strict=True)}
    return found


def _run_elsewhere(
    built: BuiltModel, graphs: Mapping[str, Graph], inputs: Mapping[str, Mapping[str, Array]], target: Target
) -> dict[str, dict[str, Array]]:
    found: dict[str, dict[str, Array]] = {}
    for name, graph in graphs.items():
        kinds = {key: graph.type_of(value) for key, value in graph.outputs}
        outputs = {key: (kind.shape, storage_dtype(kind.dtype)) for key, kind in kinds.items()}
        arguments = _arguments(built, name, graph, inputs[name])
        found[name] = run_library(built.library, arguments, outputs, target.threads, name)
    return found


def _arguments(built: BuiltModel, name: str, graph: Graph, inputs: Mapping[str, Array]) -> list[Array]:
    weights = [built.weights[key] for key in built.functions[name].weights]
    return [*(np.asarray(inputs[key]) for key in graph.inputs), *weights]
