"""Compile a graph to an artifact: generate code in a worker process, hold it against torch, pack it up.

Generated code never runs in the caller's process: a crash or a hang of it is an error here, not the end of the search.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from codegen import artifact, lower
from codegen.artifact import Artifact
from codegen.container import TOLERANCES, TensorSpec, relative_error
from codegen.cross import why_not_run
from codegen.measure import pinned_worker
from codegen.targets.base import Target
from codegen.toolchain import RUN_TIMEOUT_S
from codegen.torch_backend import to_module
from codegen.tuning import Progress, TuningDatabase, tune
from codegen.workers import RemoteError, Worker
from ir.errors import CompileError, InputError, VerificationError, did_you_mean
from ir.graph import Graph, Node, Value
from ir.hashing import canonical_hash
from ir.op import Array
from ir.ops.contraction import PRECISIONS
from ir.ops.indexing import DynamicUpdate, Take
from ir.ops.shape import Reshape
from ir.ops.structure import NUMPY_DTYPES, Component
from ir.passes.lower_convolutions import LowerConvolutions
from ir.passes.lower_precision import LowerPrecision, precision_of
from ir.passes.unroll_loops import UnrollLoops
from ir.serialize import graph_to_json

TOLERANCE: Final = TOLERANCES["float32"]
"""Largest difference from torch of a graph in float32."""
TIMEOUT_S: Final = 120.0
"""Bound on code generation and one run; a model of this tool's sizes takes seconds."""
FOREIGN_TIMEOUT_S: Final = TIMEOUT_S + RUN_TIMEOUT_S
"""The same with the run under an emulator."""

_WORKERS: Final[dict[int, Worker]] = {}


def compile_graph(
    graph: Graph,
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
    """Compile, verify and pack one graph.

    A model that rounds too much with products by Strassen's algorithm, as deep stacks of norms may, is compiled once
    more without them.

    Args:
        graph: Graph without component nodes.
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
        VerificationError: The outputs differ from torch, which rounds alike, by more than `TOLERANCES` allow, without
            Strassen's algorithm too, or are not finite.
        KernelCrash: The generated code ended its process.
        KernelTimeout: It took longer than `TIMEOUT_S`.
    """
    require_expanded(graph)
    if opt_level not in (1, 3):
        raise CompileError("unknown optimisation level", expected="1 or 3", found=str(opt_level))
    if precision is not None:
        graph = with_precision(graph, precision)
    database = TuningDatabase.for_target(target, tuning_root)
    if opt_level == 3:
        if target.is_foreign:
            raise InputError(
                "kernels are tuned by measuring them, which takes the processor itself",
                where="opt_level",
                expected="-O1",
                found=f"-O3 for {target.name}",
            )
        lowered = lower.lower(graph, target, database)
        tune([call.kernel for call in lowered.calls], target, database, trials=tuning_trials, progress=progress)
    inputs = sample_inputs(graph)
    worker = worker_for(target.threads)
    arguments = (graph, dict(params), target, database, inputs)
    build, limit_s = lower.build_and_run, TIMEOUT_S
    if target.is_foreign:
        build, limit_s = lower.build_elsewhere, FOREIGN_TIMEOUT_S
    with ThreadPoolExecutor(1) as beside:  # torch runs here while the worker builds
        reference = beside.submit(_run_beside, graph, params, inputs)
        graph_hash = beside.submit(canonical_hash, graph)
        try:
            built, outputs = worker.call(build, *arguments, timeout_s=limit_s)
        except RemoteError as error:
            reference.result()  # parameters that do not fit fail here too, and with their names
            raise CompileError("code generation failed", found=error.found) from error
    try:
        error = None if outputs is None else _verify(graph, reference.result(), outputs)
    except VerificationError:
        if not any(kernel["knobs"].get("strassen") for kernel in built.kernels):
            raise
        return compile_graph(
            graph,
            params,
            target.without_strassen(),
            opt_level=opt_level,
            tuning_trials=tuning_trials,
            tuning_root=tuning_root,
            metadata=metadata,
            progress=progress,
        )
    bounds = index_bounds(graph)
    return Artifact(
        library=built.library,
        weights=built.weights,
        parameters=dict(params),
        graph_json=graph_to_json(graph),
        graph_hash=graph_hash.result(),
        inputs=[_spec(name, node, bounds.get(name)) for name, node in graph.inputs.items()],
        outputs=[TensorSpec(name, graph.type_of(v).shape, graph.type_of(v).dtype) for name, v in graph.outputs],
        example_inputs=inputs,
        expected_outputs=reference.result() if outputs is None else outputs,
        target=artifact.describe_target(target),
        threads=target.threads,
        verification_error=error,
        unverified=why_not_run(target) if outputs is None else "",
        kernels=built.kernels,
        memory=built.memory,
        metadata=dict(metadata or {}),
    )


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


def sample_inputs(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Draw inputs on which a graph can be run: standard normal numbers, indices inside their tables."""
    rng = np.random.default_rng(seed)
    bounds = index_bounds(graph)
    drawn: dict[str, Array] = {}
    for name, node in graph.inputs.items():
        kind = node.types[0]
        if kind.is_float:
            drawn[name] = rng.standard_normal(kind.shape).astype(np.float32)
        else:
            drawn[name] = np.asarray(rng.integers(0, bounds.get(name, 2), kind.shape), NUMPY_DTYPES[kind.dtype])
    return drawn


def index_bounds(graph: Graph) -> dict[str, int]:
    """For each integer input that is an index, the number of places it can point at."""
    bounds: dict[str, int] = {}
    for name, node in graph.inputs.items():
        if node.types[0].dtype == "int32":
            limits = _limits(graph, node.results[0])
            if limits:
                bounds[name] = min(limits)
    return bounds


def torch_outputs(graph: Graph, params: Mapping[str, Array], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph in torch, in float32."""
    module = to_module(graph, params).eval()
    with torch.inference_mode():
        results = module(**{name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()})
    return {name: tensor.detach().numpy() for name, tensor in results.items()}


def _run_beside(graph: Graph, params: Mapping[str, Array], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run torch on one thread: several that wait for each other stand still wherever the worker takes a CPU."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch_outputs(graph, params, inputs)
    finally:
        torch.set_num_threads(usual)


def _limits(graph: Graph, value: Value) -> list[int]:
    limits: list[int] = []
    for user in graph.users(value):
        types = graph.operand_types(user)
        if isinstance(user.op, Take) and user.operands[1] == value:
            limits.append(types[0].shape[0])
        elif isinstance(user.op, DynamicUpdate) and user.operands[2] == value:
            limits.append(types[0].shape[user.op.axis] - types[1].shape[user.op.axis] + 1)
        elif isinstance(user.op, Reshape):
            limits += _limits(graph, user.results[0])
    return limits


def _spec(name: str, node: Node, below: int | None) -> TensorSpec:
    return TensorSpec(name, node.types[0].shape, node.types[0].dtype, below=below)


def require_expanded(graph: Graph) -> None:
    """Check that a graph has no component nodes left.

    Raises:
        CompileError: It has.
    """
    for node in graph.nodes:
        if isinstance(node.op, Component):
            raise CompileError("a component node is left", where=node.path, hint="run expand_components first")


def worker_for(threads: int) -> Worker:
    """Return this process's worker that generates code for a number of threads."""
    if threads not in _WORKERS:
        _WORKERS[threads] = pinned_worker(threads, preload=("codegen.lower",))
    return _WORKERS[threads]


def _verify(graph: Graph, expected: Mapping[str, Array], outputs: Mapping[str, Array]) -> float:
    worst, tolerance = 0.0, TOLERANCES[precision_of(graph)]
    for name, _ in graph.outputs:
        error = relative_error(outputs[name], expected[name])
        if not error <= tolerance:
            found = f"{error:g}" if np.isfinite(error) else "values that are not finite"
            raise VerificationError(
                "the compiled model disagrees with torch",
                where=f"output {name}",
                expected=f"at most {tolerance:g}",
                found=found,
            )
        worst = max(worst, error)
    return worst
