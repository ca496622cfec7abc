"""Compile a graph to an artifact: generate code in a worker process, hold it against torch, pack it up.

Generated code never runs in the caller's process: a crash or a hang of it is an error here, not the end of the search.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from codegen import artifact, build, lower
from codegen.artifact import Artifact, Function
from codegen.build import BuiltFunction, BuiltModel
from codegen.code_workers import worker_for
from codegen.container import TensorSpec
from codegen.cross import why_not_run
from codegen.gpu import build as device
from codegen.gpu import execute
from codegen.gpu.cuda import build as cuda
from codegen.gpu.cuda import device as cuda_device
from codegen.gpu.cuda import nvcc
from codegen.inputs import index_bounds, sample_inputs
from codegen.kernels.base import storage_dtype
from codegen.manifest import FORWARD
from codegen.measure import pinned_worker
from codegen.reference import torch_outputs, torch_outputs_beside, verify
from codegen.targets.base import Target
from codegen.toolchain import RUN_TIMEOUT_S
from codegen.tuning import Progress, TuningDatabase, tune
from codegen.workers import RemoteError, Worker
from ir.cost import STATE_PREFIX
from ir.errors import CompileError, InputError, VerificationError, did_you_mean
from ir.graph import Graph
from ir.op import Array
from ir.ops.contraction import PRECISIONS
from ir.ops.structure import Component
from ir.passes.lower_convolutions import LowerConvolutions
from ir.passes.lower_precision import LowerPrecision
from ir.passes.unroll_loops import UnrollLoops
from ir.serialize import graph_to_json

TIMEOUT_S: Final = 120.0
"""Bound on code generation and one run; a model of this tool's sizes takes seconds."""
FOREIGN_TIMEOUT_S: Final = TIMEOUT_S + RUN_TIMEOUT_S
"""The same with the run under an emulator."""

POSITION: Final = "position"
"""Input of a function that streams: the number of tokens before these."""
_STREAM_CALLS: Final = 4  # the self-test of a function that streams is its fourth call
CUDA: Final = "cuda"


@dataclass(frozen=True)
class Source:
    """A function to compile.

    Attributes:
        graph: Graph without component nodes.
        role: What it is for, see `codegen.artifact.Function`.
        axes: For an input or output by name, what its axes are, see `TensorSpec.axes`.
        padded: Axes along which smaller inputs may be padded.
    """

    graph: Graph
    role: str = FORWARD
    axes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict[str, tuple[str | None, ...]])
    padded: Sequence[str] = ()


def compile_graph(graph: Graph, params: Mapping[str, Array], target: Target, **options: Any) -> Artifact:
    """Compile, verify and pack one graph as the function `forward`; see `compile_functions`."""
    return compile_functions({FORWARD: Source(graph)}, params, target, **options)


def compile_functions(
    sources: Mapping[str, Source],
    params: Mapping[str, Array],
    target: Target,
    *,
    precision: str | None = None,
    opt_level: int = 1,
    tuning_trials: int = 0,
    tuning_root: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compile, verify and pack graphs that share parameters; kernels and weights that they have in common once.

    A model that rounds too much with products by Strassen's algorithm, as deep stacks of norms may, is compiled once
    more without them.

    Args:
        sources: Functions by their names in the library, `forward` among them.
        params: A float32 array for each parameter.
        target: What to compile for. The result is run to verify it: for another processor under an emulator, and where
            there is none it is said to be unverified.
        precision: `bfloat16` rounds the operands of products to that, `float32` does not; None leaves every product as
            the graph has it.
        opt_level: 1 takes tuned knobs where the database has them, else each kernel's rule; 3 tunes first.
        tuning_trials: Kernel candidates that level 3 may measure, in all.
        tuning_root: Folder of the tuning databases; see `TuningDatabase.for_target`.
        metadata: Anything to keep inside the artifact.
        progress: Called during tuning with candidates done, candidates in all, and what is tried next.

    Returns:
        The artifact, verified on random inputs; `unverified` says why where it could not be run.

    Raises:
        InputError: Kernels should be tuned for another processor.
        CompileError: A node has no kernel, or code generation failed.
        TargetUnavailable: There is no cross compiler for another processor.
        VerificationError: The outputs differ from torch, which rounds alike, and from torch in float64 by more than
            `TOLERANCES` allow, without Strassen's algorithm too, or are not finite.
        KernelCrash: The generated code ended its process.
        KernelTimeout: It took longer than `TIMEOUT_S`.
    """
    sources = _checked(sources, opt_level, precision)
    database = TuningDatabase.for_target(target, tuning_root)
    if opt_level == 3:
        _tune(sources, target, database, tuning_trials, progress)
    inputs = {name: _example_inputs(source, params) for name, source in sources.items()}
    made = _build_beside_torch(sources, params, target, database, inputs)
    built, found = made.built, made.outputs or made.expected
    errors: dict[str, float | None] = dict.fromkeys(sources)
    try:
        for name, outputs in (made.outputs or {}).items():
            errors[name] = verify(sources[name].graph, params, inputs[name], made.expected[name], outputs)
    except VerificationError:
        if not _uses_strassen(built):
            raise
        return compile_functions(
            sources,
            params,
            target.without_strassen(),
            opt_level=opt_level,
            tuning_trials=tuning_trials,
            tuning_root=tuning_root,
            metadata=metadata,
            progress=progress,
        )
    return Artifact(
        library=built.library,
        functions={
            name: _function(source, built.functions[name], inputs[name], found[name], errors[name])
            for name, source in sources.items()
        },
        weights=built.weights,
        parameters=dict(params),
        target=artifact.describe_target(target),
        threads=target.threads,
        unverified=_why_not_run(target) if made.outputs is None else "",
        extras=built.extras,
        tuning_records=_records(built, target, database),
        metadata=dict(metadata or {}),
    )


def _checked(sources: Mapping[str, Source], opt_level: int, precision: str | None) -> Mapping[str, Source]:
    """Refuse what cannot be compiled; return the functions with products of the precision asked for."""
    for source in sources.values():
        require_expanded(source.graph)
    if opt_level not in (1, 3):
        raise CompileError("unknown optimisation level", expected="1 or 3", found=str(opt_level))
    if precision is None:
        return sources
    return {name: replace(source, graph=with_precision(source.graph, precision)) for name, source in sources.items()}


def _tune(
    sources: Mapping[str, Source], target: Target, database: TuningDatabase, trials: int, progress: Progress | None
) -> None:
    """Tune the kernels of all functions."""
    if target.is_foreign or target.gpu is not None:
        raise InputError(
            "kernels are tuned by measuring them, which takes the processor itself",
            where="opt_level",
            expected="-O1",
            found=f"-O3 for {target.name}",
        )
    lowered = [lower.lower(source.graph, target, database) for source in sources.values()]
    kernels = [call.kernel for part in lowered for call in part.calls]
    tune(kernels, target, database, trials=trials, progress=progress)


@dataclass(frozen=True)
class _Made:
    """What was built, its outputs where it was run, and torch's outputs, by function."""

    built: BuiltModel
    outputs: Mapping[str, Mapping[str, Array]] | None
    expected: Mapping[str, Mapping[str, Array]]


def _uses_strassen(built: BuiltModel) -> bool:
    return any(kernel["knobs"].get("strassen") for part in built.functions.values() for kernel in part.kernels)


def _why_not_run(target: Target) -> str:
    """Say what is missing to run code for a target here; empty where nothing is."""
    if target.gpu is None:
        return why_not_run(target)
    if target.gpu.kind == CUDA:
        return cuda_device.why_not_run(target.gpu.model)
    return execute.why_not_run(target.gpu)


def describe_kernels(graph: Graph, target: Target, tuning_root: str | Path | None = None) -> list[dict[str, Any]]:
    """List which kernel serves each node of an expanded graph, without compiling it; see `lower.describe`."""
    require_expanded(graph)
    return lower.describe(lower.lower(graph, target, TuningDatabase.for_target(target, tuning_root)))


def with_precision(graph: Graph, precision: str) -> Graph:
    """Return a graph whose products, convolutions that are products included, round their operands to a precision.

    Raises:
        CompileError: There is no such precision.
    """
    if precision not in PRECISIONS:
        hint = did_you_mean(precision, PRECISIONS)
        expected = " or ".join(PRECISIONS)
        raise CompileError("unknown precision", expected=expected, found=repr(precision), hint=hint)
    return LowerPrecision(precision)(LowerConvolutions()(UnrollLoops()(graph)))


def _build_beside_torch(
    sources: Mapping[str, Source],
    params: Mapping[str, Array],
    target: Target,
    database: TuningDatabase,
    inputs: Mapping[str, Mapping[str, Array]],
) -> _Made:
    """Build and run in a worker while torch runs here."""
    graphs = {name: source.graph for name, source in sources.items()}
    with ThreadPoolExecutor(1) as beside:
        reference = {
            name: beside.submit(torch_outputs_beside, graph, params, inputs[name]) for name, graph in graphs.items()
        }
        try:
            built, outputs = _build(graphs, params, target, database, inputs)
        except RemoteError as error:
            for one in reference.values():
                one.result()  # parameters that do not fit fail here too, and with their names
            raise CompileError("code generation failed", found=error.found) from error
    expected = {name: one.result() for name, one in reference.items()}
    return _Made(built, outputs, expected)


def _build(
    graphs: Mapping[str, Graph],
    params: Mapping[str, Array],
    target: Target,
    database: TuningDatabase,
    inputs: Mapping[str, Mapping[str, Array]],
) -> tuple[BuiltModel, Mapping[str, Mapping[str, Array]] | None]:
    worker, work = worker_for(target.threads), build.build_and_run
    if target.gpu is not None:
        is_cuda = target.gpu.kind == CUDA
        worker, work = (cuda_worker(), cuda.build_and_run) if is_cuda else (worker, device.build_and_run)
    limit_s = FOREIGN_TIMEOUT_S if target.is_foreign or target.gpu is not None else TIMEOUT_S
    return worker.call(work, graphs, dict(params), target, database, inputs, timeout_s=limit_s * len(graphs))


def _function(
    source: Source,
    built: BuiltFunction,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
    error: float | None,
) -> Function:
    """Describe a function that was built and run."""
    graph, bounds = source.graph, index_bounds(source.graph)
    kinds = {name: graph.type_of(value) for name, value in graph.outputs}
    streams = source.role != FORWARD
    return Function(
        inputs=[
            TensorSpec(name, node.types[0].shape, node.types[0].dtype, bounds.get(name), source.axes.get(name))
            for name, node in graph.inputs.items()
        ],
        outputs=[
            TensorSpec(name, kind.shape, storage_dtype(kind.dtype), axes=source.axes.get(name))
            for name, kind in kinds.items()
        ],
        weights=built.weights,
        graph_json=graph_to_json(graph),
        graph_hash=built.graph_hash,
        example_inputs=inputs,
        expected_outputs=outputs,
        role=source.role,
        carried=[name for name in graph.inputs if streams and name.startswith(STATE_PREFIX)],
        position=POSITION if streams and POSITION in graph.inputs else None,
        padded=source.padded,
        verification_error=error,
        kernels=built.kernels,
        memory=built.memory,
    )


def _records(built: BuiltModel, target: Target, database: TuningDatabase) -> list[str]:
    """List the tuning records that knobs were taken from."""
    tuned = {kernel["kernel"] for part in built.functions.values() for kernel in part.kernels if kernel["tuned"]}
    found = {database.identity(kernel, target) for kernel in tuned}
    return sorted(identity for identity in found if identity is not None)


def _example_inputs(source: Source, params: Mapping[str, Array]) -> dict[str, Array]:
    """Draw inputs of the self-test; of a function that streams, those after some calls from the start."""
    graph, inputs = source.graph, sample_inputs(source.graph)
    if source.role == FORWARD:
        return inputs
    carried = [name for name in graph.inputs if name.startswith(STATE_PREFIX)]
    [tokens] = {node.types[0].shape[1] for name, node in graph.inputs.items() if name not in (*carried, POSITION)}
    calls = min(_STREAM_CALLS, 1 + (index_bounds(graph).get(POSITION, _STREAM_CALLS * tokens) - 1) // tokens)
    state = {name: np.zeros_like(inputs[name]) for name in carried}
    for call in range(calls):
        inputs = sample_inputs(graph, call) | state
        if POSITION in inputs:
            inputs[POSITION] = np.asarray(call * tokens, np.int32)
        if call < calls - 1:
            outputs = torch_outputs(graph, params, inputs)
            state = {name: outputs[name] for name in carried}
    return inputs


def require_expanded(graph: Graph) -> None:
    """Check that a graph has no component nodes left.

    Raises:
        CompileError: It has.
    """
    for node in graph.nodes:
        if isinstance(node.op, Component):
            raise CompileError("a component node is left", where=node.path, hint="run expand_components first")


@functools.cache
def cuda_worker() -> Worker:
    """Return this process's worker that generates code for NVIDIA GPUs.

    Raises:
        TargetUnavailable: There is no CUDA compiler.
    """
    return pinned_worker(1, preload=("codegen.gpu.cuda.build",), environment=nvcc.worker_environment())
