"""What the C code of a model does: which kernels run in which order, and where everything lies.

Made in a worker process, from graphs; `codegen.c_export.sources` writes it down as C.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from codegen import lower
from codegen.c_export.plain import compile_kernels
from codegen.c_export.signature import STEP
from codegen.kernels.base import Array, storage_dtype
from codegen.memory import aligned, plan_memory
from codegen.packing import Layouts, PackedWeights
from codegen.selection.select import aliases
from codegen.selection.state import KernelCall, Static, Table
from codegen.targets.base import Target
from codegen.tuning import TuningDatabase
from ir.cost import STATE_PREFIX
from ir.graph import Graph, Value


@dataclass(frozen=True)
class Place:
    """Where an array lies.

    Attributes:
        kind: `weights` and `memory` count bytes from their start, `input` and `output` are arguments by number.
        at: Byte or number.
    """

    kind: str
    at: int


@dataclass(frozen=True)
class Call:
    """One kernel with the places of its operands, those it writes last."""

    symbol: str
    operands: tuple[Place, ...]


@dataclass(frozen=True)
class Function:
    """One function of the model.

    Attributes:
        name: `forward` or `step`.
        calls: Kernels in order.
        copies: Outputs that no kernel writes: destination, source, bytes.
        memory_bytes: Memory of all that lives between kernels.
        kept: Parts of the state that kernels extend where they lie.
        kernels: What serves which node, see `lower.describe`.
    """

    name: str
    calls: tuple[Call, ...]
    copies: tuple[tuple[Place, Place, int], ...]
    memory_bytes: int
    kept: frozenset[str]
    kernels: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Program:
    """A model's machine code with all that its C code needs to know.

    Attributes:
        functions: In the order given.
        signatures: For each kernel by symbol, how many operands it reads and how many it writes.
        labels: Workload of each kernel by symbol, for people.
        code: The object file of the kernels.
        weights: All weights as they lie in memory.
        workspace_bytes: Scratch memory of the kernel that needs most.
    """

    functions: tuple[Function, ...]
    signatures: Mapping[str, tuple[int, int]]
    labels: Mapping[str, str]
    code: bytes
    weights: bytes
    workspace_bytes: int


def make_program(
    graphs: Mapping[str, Graph],
    params: Mapping[str, Array],
    target: Target,
    database: TuningDatabase,
    prefix: str,
) -> Program:
    """Lower graphs that share parameters to one program, kernels and weights that they have in common once.

    Args:
        graphs: Graph of each function.
        params: Parameters of them all.
        target: What to compile for.
        database: Tuned knobs.
        prefix: First word of each symbol.
    """
    writer = _Writer(params, target, prefix)
    functions = tuple(
        writer.function(name, lower.lower(graph, target, database), graph) for name, graph in graphs.items()
    )
    built = compile_kernels(writer.kernels, target)
    signatures = {symbol: (len(kernel.inputs), len(kernel.outputs)) for symbol, kernel in writer.generators.items()}
    labels = {symbol: kernel.key for symbol, kernel in writer.generators.items()}
    return Program(functions, signatures, labels, built.code, bytes(writer.weights), built.workspace_bytes)


class _Writer:
    """Collects kernels and weights over the functions of a program."""

    def __init__(self, params: Mapping[str, Array], target: Target, prefix: str) -> None:
        self.kernels: dict[str, Any] = {}
        self.generators: dict[str, Any] = {}
        self.weights = bytearray()
        self._params, self._target, self._prefix = params, target, prefix
        self._symbols: dict[str, str] = {}
        self._starts: dict[bytes, int] = {}
        self._layouts = Layouts(params, target)

    def function(self, name: str, lowered: lower.Lowered, graph: Graph) -> Function:
        """Lay out one function, its weights as those of the functions before it where a kernel can read them so."""
        state = {key: key for key, _ in graph.outputs if name == STEP and key.startswith(STATE_PREFIX)}
        lowered = self._layouts.fit(lower.in_place(lowered, self._target, state))
        packed = PackedWeights(lowered, self._params, self._target)
        places = _Places(lowered, graph)
        calls: list[Call] = []
        for call in lowered.calls:
            operands = [
                Place("weights", self._weight(packed.arrays[packed.name(call, index)]))
                if isinstance(operand, Static | Table)
                else places.of(operand)
                for index, operand in enumerate(call.operands)
            ]
            results = [places.make(value) for value in call.results]
            calls.append(Call(self._symbol(call, lowered), (*operands, *results)))
        self._layouts.remember(lowered, packed)
        copies, kernels = tuple(places.copies()), lower.describe(lowered)
        return Function(name, tuple(calls), copies, places.memory_bytes, frozenset(places.kept), kernels)

    def _symbol(self, call: KernelCall, lowered: lower.Lowered) -> str:
        kernel = call.kernel
        if kernel.key not in self._symbols:
            symbol = f"{self._prefix}_kernel_{len(self._symbols)}"
            self._symbols[kernel.key] = symbol
            self.kernels[symbol] = lower.prim_func(kernel, self._target, lowered.knobs[kernel.key])
            self.generators[symbol] = kernel
        return self._symbols[kernel.key]

    def _weight(self, array: Array) -> int:
        """Return where a weight begins; equal ones lie there once."""
        data = array.tobytes()
        identity = hashlib.sha256(data).digest()
        if identity not in self._starts:
            self.weights.extend(b"\0" * (aligned(len(self.weights)) - len(self.weights)))
            self._starts[identity] = len(self.weights)
            self.weights.extend(data)
        return self._starts[identity]


class _Places:
    """Places of the run-time values of one function, as its kernels make them."""

    def __init__(self, lowered: lower.Lowered, graph: Graph) -> None:
        self._graph = lowered.graph
        self._alias = aliases(lowered.graph, lowered.calls)
        plan = plan_memory(lowered.graph, lowered.calls)
        self._planned, self._in_place, self.memory_bytes = plan.starts, plan.in_place, plan.memory_bytes
        self.kept: set[str] = set()
        self._returned: dict[Value, Place] = {}
        for number, (_, value) in enumerate(lowered.graph.outputs):
            self._returned.setdefault(self._alias.get(value, value), Place("output", number))
        self._inputs = list(graph.inputs)
        self._made = {
            node.results[0]: Place("input", self._inputs.index(name)) for name, node in lowered.graph.inputs.items()
        }

    def of(self, value: Value) -> Place:
        """Return where a value lies."""
        return self._made[self._alias.get(value, value)]

    def make(self, value: Value) -> Place:
        """Return where a kernel writes a value, which lies there from then on."""
        if value in self._planned:
            self._made[value] = Place("memory", self._planned[value])
        elif value in self._in_place:
            self._made[value] = self.of(self._in_place[value])
            self.kept.add(self._inputs[self._made[value].at])
        else:
            self._made[value] = self._returned[value]
        return self._made[value]

    def copies(self) -> list[tuple[Place, Place, int]]:
        """List the outputs that lie elsewhere when the last kernel is done."""
        moved: list[tuple[Place, Place, int]] = []
        for number, (name, value) in enumerate(self._graph.outputs):
            kind = self._graph.type_of(value)
            place, size_bytes = self.of(value), kind.size * np.dtype(storage_dtype(kind.dtype)).itemsize
            if place != Place("output", number) and name not in self.kept:
                moved.append((Place("output", number), place, size_bytes))
        return moved
