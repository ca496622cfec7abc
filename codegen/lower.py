"""The compiler, top to bottom: graph -> simplified graph -> kernel calls -> Relax module -> shared library.

Everything here imports TVM and runs in a worker process; `codegen.compile` is the side that callers see.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from codegen._tvm import DEVICE_PIPELINE, TIR_PIPELINE, WORKLOAD_ATTRIBUTE, PassContext, Target, relax, tvm
from codegen.cache import Program
from codegen.cross import WITHOUT_DEBUG, linker
from codegen.gpu.cuda.linking import attach_code
from codegen.gpu.registry import generator
from codegen.kernels.base import Kernel, Knobs, storage_dtype
from codegen.memory import plan_memory
from codegen.native import Generated, NativeWriter
from codegen.packing import PackedWeights
from codegen.selection.in_place import update_in_place
from codegen.selection.precision import store_bfloat16
from codegen.selection.select import aliases, select
from codegen.selection.state import KernelCall, Static, Table
from codegen.targets.base import Target as NasTarget
from codegen.tuning import TuningDatabase
from ir.errors import CompileError
from ir.graph import Graph, Value
from ir.passes import (
    canonicalize,
    cse,
    dce,
    fold_constants,
    lower_batch_norm,
    lower_convolutions,
    merge_branches,
    unroll_loops,
)
from ir.types import TensorType

PASSES: Final[tuple[Callable[[Graph], Graph], ...]] = (
    unroll_loops.UnrollLoops(),
    lower_batch_norm.LowerBatchNorm(),
    merge_branches.MergeBranches(),
    lower_convolutions.LowerConvolutions(),
    canonicalize.Canonicalize(),
    fold_constants.FoldConstants(),
    cse.Cse(),
    dce.Dce(),
)
"""Simplifications of the graph before kernels are chosen."""


@dataclass(frozen=True)
class Lowered:
    """A graph as kernels.

    Attributes:
        graph: The simplified graph.
        calls: Kernel calls in order.
        knobs: Knobs of each kernel, by `Kernel.key`.
        tuned: Keys of the kernels whose knobs were measured.
    """

    graph: Graph
    calls: Sequence[KernelCall]
    knobs: Mapping[str, Knobs]
    tuned: frozenset[str]


def simplify(graph: Graph, dump: Callable[[str, Graph], None] | None = None) -> Graph:
    """Run `PASSES`, calling `dump(name, graph)` after each."""
    for transform in PASSES:
        graph = transform(graph)
        if dump is not None:
            dump(type(transform).__name__, graph)
    return graph


def lower(graph: Graph, target: NasTarget, database: TuningDatabase | None = None) -> Lowered:
    """Choose kernels and their knobs: tuned ones where the database has them, else each kernel's rule.

    Raises:
        CompileError: A node has no kernel.
    """
    graph = simplify(graph)
    calls = select(graph)
    calls = store_bfloat16(graph, calls, aliases(graph, calls))
    kernels = {call.kernel.key: call.kernel for call in calls}
    found = {key: database.knobs(kernel, target) for key, kernel in kernels.items()} if database else {}
    tuned = {key: knobs for key, knobs in found.items() if knobs is not None}
    knobs = {key: tuned.get(key) or _rule(kernel, target) for key, kernel in kernels.items()}
    return Lowered(graph, calls, knobs, frozenset(tuned))


def in_place(lowered: Lowered, target: NasTarget, successors: Mapping[str, str] | None = None) -> Lowered:
    """Let processors extend the caches that a function is given, see `update_in_place`."""
    if target.gpu is not None:
        return lowered
    calls = update_in_place(lowered.graph, lowered.calls, successors)
    new = {call.kernel.key: call.kernel for call in calls if call.kernel.key not in lowered.knobs}
    knobs = {**lowered.knobs, **{key: _rule(kernel, target) for key, kernel in new.items()}}
    return replace(lowered, calls=calls, knobs=knobs)


def _rule(kernel: Kernel, target: NasTarget) -> Knobs:
    """Pick knobs without measuring."""
    if target.gpu is None:
        return kernel.knobs(target.isa)
    return generator(kernel, target.gpu).knobs(kernel, target.gpu)


def describe(lowered: Lowered) -> list[dict[str, Any]]:
    """List what serves each node: kernel, family, knobs, whether tuned, flops, and the nodes with their scopes."""
    records: list[dict[str, Any]] = []
    for call in lowered.calls:
        nodes = [lowered.graph.node(number) for number in call.nodes]
        records.append(
            {
                "kernel": call.kernel.key,
                "family": call.kernel.family,
                "knobs": dict(lowered.knobs[call.kernel.key]),
                "tuned": call.kernel.key in lowered.tuned,
                "flops": call.kernel.flops,
                "bytes": call.kernel.bytes_moved,
                "generic": call.kernel.is_generic,
                "scope": max((node.scope for node in nodes), key=len),
                "nodes": [node.path for node in nodes],
            }
        )
    return records


def program(lowered: Lowered, weights: PackedWeights) -> Program:
    """State what the library of a lowered graph depends on: values are numbered in order, inputs first."""
    graph = lowered.graph
    alias = aliases(graph, lowered.calls)
    numbers = {node.results[0]: number for number, node in enumerate(graph.inputs.values())}
    order: dict[str, int] = {}
    steps: list[Any] = []
    for call in lowered.calls:
        operands: list[Any] = []
        for index, operand in enumerate(call.operands):
            if isinstance(operand, Static | Table):
                operands.append(["weight", order.setdefault(weights.name(call, index), len(order))])
            else:
                operands.append(numbers[alias.get(operand, operand)])
        for value in call.results:
            numbers[value] = len(numbers)
        results = [numbers[value] for value in call.results]
        steps.append([call.kernel.key, dict(lowered.knobs[call.kernel.key]), operands, results])
    return Program(
        inputs=[[node.types[0].shape, node.types[0].dtype] for node in graph.inputs.values()],
        weights=[[weights.arrays[name].shape, weights.arrays[name].dtype.name] for name in order],
        steps=steps,
        outputs=[[numbers[alias.get(value, value)], graph.type_of(value).shape] for _, value in graph.outputs],
    )


def make_library(functions: Mapping[str, tuple[Lowered, PackedWeights]], target: NasTarget) -> bytes:
    """Generate a library with some functions; kernels that they have in common are there once.

    Raises:
        CompileError: TVM or the linker refuses.
    """
    return _library(relax_module(functions, target), target)


def relax_module(functions: Mapping[str, tuple[Lowered, PackedWeights]], target: NasTarget) -> tvm.IRModule:
    """Write functions of inputs and weights, which call their kernels in order on the memory that was planned.

    For a graphics processor the virtual machine starts each kernel; a processor's function calls them by itself.
    """
    builder = relax.BlockBuilder()
    if target.gpu is None:
        native = NativeWriter(builder)
        for name, (lowered, weights) in functions.items():
            native.write(
                name, lowered.graph, lowered.calls, weights, lambda call, low=lowered: _made(call, low, target)
            )
        return builder.get()
    kernels: dict[Any, Any] = {}
    for name, (lowered, weights) in functions.items():
        _write_function(name, lowered, weights, _ModuleWriter(lowered, target, builder, kernels))
    return builder.get()


def _made(call: KernelCall, lowered: Lowered, target: NasTarget) -> Generated:
    knobs = lowered.knobs[call.kernel.key]
    return (call.kernel.key, tuple(knobs.items())), lambda: prim_func(call.kernel, target, knobs)


def _write_function(symbol: str, lowered: Lowered, weights: PackedWeights, writer: _ModuleWriter) -> None:
    graph = lowered.graph
    inputs = [
        (node.results[0], relax.Var(name, relax.TensorType(node.types[0].shape, node.types[0].dtype)))
        for name, node in graph.inputs.items()
    ]
    parameters: dict[str, Any] = {}
    for call in lowered.calls:
        for index, operand in enumerate(call.operands):
            if isinstance(operand, Static | Table):
                name = weights.name(call, index)
                array = weights.arrays[name]
                parameters.setdefault(
                    name, relax.Var(f"w{len(parameters)}", relax.TensorType(array.shape, array.dtype.name))
                )
    with writer.builder.function(symbol, [var for _, var in inputs] + list(parameters.values()), pure=False):
        writer.begin(dict(inputs))
        for call in lowered.calls:
            writer.call(call, lambda index, call=call: parameters[weights.name(call, index)])
        results = [writer.read(value, graph.type_of(value).shape) for _, value in graph.outputs]
        writer.builder.emit_func_output(results[0] if len(results) == 1 else relax.Tuple(results))


class _ModuleWriter:
    """Writes starts of a device's kernels as statements of a Relax function; `kernels`: those so far."""

    def __init__(self, lowered: Lowered, target: NasTarget, builder: Any, kernels: dict[Any, Any]) -> None:
        self.builder = builder
        self.lowered, self.target = lowered, target
        self.plan = plan_memory(lowered.graph, lowered.calls)
        self._alias = aliases(lowered.graph, lowered.calls)
        self._functions = kernels
        self._storages: list[Any] = []
        self._values: dict[Value, Any] = {}

    def begin(self, inputs: Mapping[Value, Any]) -> None:
        """Set the planned storages aside."""
        self._values.update(inputs)
        self._storages = [
            self.builder.emit(relax.op.memory.alloc_storage(relax.ShapeExpr([size_bytes]), 0, "global", "uint8"))
            for size_bytes in self.plan.storages
        ]

    def call(self, call: KernelCall, weight: Callable[[int], Any]) -> None:
        """Write one call; `weight` gives the variable of a static operand."""
        kernel, knobs = call.kernel, self.lowered.knobs[call.kernel.key]
        identity = kernel.key, tuple(knobs.items())
        if identity not in self._functions:
            function = prim_func(kernel, self.target, knobs)
            self._functions[identity] = self.builder.add_func(function, kernel.symbol[:80])
        arguments = [
            weight(index) if isinstance(operand, Static | Table) else self.read(operand, kernel.inputs[index].shape)
            for index, operand in enumerate(call.operands)
        ]
        made = [self._allocate(value, kind) for value, kind in zip(call.results, kernel.outputs, strict=True)]
        self.builder.emit(relax.Call(self._functions[identity], [*arguments, *made]))
        self._values.update(zip(call.results, made, strict=True))

    def read(self, value: Value, shape: tuple[int, ...]) -> Any:
        """Return a value under a shape; the same memory."""
        made = self._values[self._alias.get(value, value)]
        current = tuple(int(size) for size in made.ty.shape)
        return made if current == tuple(shape) else self.builder.emit(relax.op.reshape(made, shape))

    def _allocate(self, value: Value, kind: TensorType) -> Any:
        """Return memory for a value: where the plan puts it, or of its own where the caller keeps it."""
        shape, dtype = relax.ShapeExpr(kind.shape), storage_dtype(kind.dtype)
        if value not in self.plan.places:
            return self.builder.emit(relax.op.builtin.alloc_tensor(shape, dtype, 0))
        storage = self._storages[self.plan.places[value]]
        return self.builder.emit(relax.op.memory.alloc_tensor(storage, 0, shape, dtype))


def prim_func(kernel: Kernel, target: NasTarget, knobs: Knobs) -> Any:
    """Generate one kernel.

    Raises:
        CompileError: The generator, or TVM in it, refuses.
    """
    try:
        if target.gpu is None:
            return kernel.build(target.isa, knobs)
        made = generator(kernel, target.gpu).build(kernel, target.gpu, knobs)
        return made.with_attr(WORKLOAD_ATTRIBUTE, kernel.key)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CompileError("a kernel could not be generated", where=kernel.key, found=str(error)) from error


def _library(module: tvm.IRModule, target: NasTarget) -> bytes:
    """Compile through the few Relax passes that a module of kernel calls needs, and link."""
    tvm_target = Target(target.to_tvm())
    tir_pipeline = TIR_PIPELINE if target.gpu is None else DEVICE_PIPELINE
    if target.gpu is not None and target.gpu.kind == "cuda":
        module = attach_code(module, target.gpu.model)
    try:
        with tvm_target, PassContext(opt_level=3):
            executable = relax.build(module, tvm_target, relax_pipeline=relax_pipeline(), tir_pipeline=tir_pipeline)
        with tempfile.TemporaryDirectory(prefix="nas-") as folder:
            path = Path(folder) / "library.so"
            link = link_for(target) if target.is_foreign else None
            executable.export_library(str(path), fcompile=link, options=list(WITHOUT_DEBUG))
            return path.read_bytes()
    except (RuntimeError, TypeError, ValueError) as error:
        raise CompileError("code generation failed", found=str(error)[-2000:]) from error


def link_for(target: NasTarget) -> Callable[..., None]:
    """Return what links objects into a library for another processor."""
    compiler, options = linker(target)

    def link(path: str, objects: Sequence[str], **_: Any) -> None:
        done = subprocess.run([compiler, "-o", path, *objects, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{compiler}: {done.stderr}")

    return link


def relax_pipeline() -> Any:
    """Return the few Relax passes that a module of kernel calls needs."""
    transform = relax.transform
    return tvm.transform.Sequential(
        [
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )
