"""The functions of the Python API that are nobody else's: `compile`, `export`, `load`, `verify` and `get_task`.

Loading an artifact needs numpy and the TVM runtime only, so nothing heavier is imported before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ir.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from codegen.artifact import Artifact
    from codegen.compile import Source
    from codegen.formats import Exported
    from codegen.runtime import LoadedModel, VerifyReport
    from codegen.targets.base import Target
    from ir.graph import Graph
    from nas.study import Study
    from nas.tasks.base import Task
    from nas.trial import Trial
    from searchspaces.architecture import Architecture

    Weights: TypeAlias = Mapping[str, np.ndarray]

DEFAULT_TUNING_TRIALS = 128
"""Kernel candidates that level 3 measures where the caller gives no number: a minute or two for a small model."""


def compile(
    model: Trial | Architecture | Graph | Artifact,
    *,
    target: str | Target = "cpu",
    task: str | Task | None = None,
    weights: Weights | None = None,
    threads: int | None = None,
    precision: str | None = None,
    strassen: bool = True,
    opt_level: int | None = None,
    tuning_trials: int | None = None,
    tuning_dir: str | Path | None = None,
    batch: int | Sequence[int] | None = None,
    seq_len: int | Sequence[int] | None = None,
    step: bool = False,
    prefill: bool = False,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Artifact:
    """Compile a model for a target and verify it against torch.

    Args:
        model: A trial, with its trained weights; an architecture or a graph; or an artifact to compile again.
        target: Target or its name.
        task: Task of an architecture, which fixes inputs and outputs.
        weights: Parameters by name; a trial's own, an artifact's own, or freshly initialised ones where None.
        threads: Threads to compile for; all CPUs of the process where None.
        precision: `bfloat16` rounds the operands of products to that, with sums and everything else in float32;
            `float32` does not; None keeps what a graph or an artifact says, which is float32 unless it was asked for.
        strassen: Whether large products may run as seven half ones; see `Target.without_strassen` for when not to.
        opt_level: 1 takes what is known of each kernel, 3 tunes first; None is 3 where `tuning_trials` is given.
        tuning_trials: Kernel candidates that level 3 measures.
        tuning_dir: Folder of the tuning databases.
        batch: Sequences in one call, 1 or what a study measured where None; a function for each of several.
        seq_len: Tokens in a sequence, the task's or what a study measured where None; a function for each of several.
            It is the longest stream, too.
        step: Whether to add the function for one token and the state before it.
        prefill: Whether to add the function for a sequence and the state before it.
        seed: Seed of freshly initialised weights.
        progress: Called during tuning with candidates done, candidates in all, and what is tried.

    Returns:
        The artifact; `save` writes it to a file.

    Raises:
        InputError: Something is missing to compile this model.
        TargetUnavailable: The target is not to be had here.
        CompileError: It cannot be compiled.
        VerificationError: The compiled model disagrees with torch.
    """
    if opt_level is None:
        opt_level = 3 if tuning_trials else 1
    if tuning_trials is None:
        tuning_trials = DEFAULT_TUNING_TRIALS if opt_level == 3 else 0
    sizes = {"batch": _sizes(batch), "seq_len": _sizes(seq_len)}
    shape = {name: min(those) for name, those in sizes.items() if those}
    graph, own_weights, metadata = _prepare(model, task, shape, weights is None)
    from codegen.code_workers import start_beside

    start_beside(target, threads)
    from codegen.compile import compile_functions

    resolved = resolve_target(target, threads)
    if not strassen:
        resolved = resolved.without_strassen()
    sources = _sources(model, task, graph, sizes, step=step, prefill=prefill)
    return compile_functions(
        sources,
        _weights(graph, own_weights if weights is None else weights, seed),
        resolved,
        precision=precision,
        opt_level=opt_level,
        tuning_trials=tuning_trials,
        tuning_root=tuning_dir,
        metadata=metadata,
        progress=progress,
    )


def export(
    model: Trial | Architecture | Graph | Artifact,
    path: str | Path,
    *,
    format: str = "onnx",
    step: bool = False,
    target: str | Target = "cpu",
    task: str | Task | None = None,
    weights: Weights | None = None,
    threads: int | None = None,
    precision: str | None = None,
    strassen: bool = True,
    batch: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
) -> Exported:
    """Write a model in a format that other programs read, verified against torch where it can be run here.

    Args:
        model: A trial, an architecture, a graph or an artifact, as for `compile`.
        path: File or folder to write.
        format: Name of the format; `codegen.formats.available()` lists them.
        step: Whether to write the function for one token and the state before it too.
        target: Target or its name, for formats that hold code.
        task: Task of an architecture, which fixes inputs and outputs.
        weights: Parameters by name, as for `compile`.
        threads: Threads to compile for, for formats that hold code.
        precision: What the operands of products are rounded to, as for `compile`.
        strassen: Whether large products may run as seven half ones, for formats that hold code.
        batch: Sequences in one call.
        seq_len: Tokens in a sequence; the longest stream that `step` may see.
        seed: Seed of freshly initialised weights.

    Returns:
        What was written, and its largest difference from torch.

    Raises:
        InputError: Something is missing to write this model, or it does not stream.
        TargetUnavailable: The target is not to be had here.
        CompileError: It cannot be written in this format.
        VerificationError: What was made disagrees with torch.
        StorageError: It could not be written.
    """
    from codegen import formats
    from codegen.compile import with_precision

    into = formats.get(format)
    shape = {name: size for name, size in (("batch", batch), ("seq_len", seq_len)) if size is not None}
    graph, own_weights, metadata = _prepare(model, task, shape, weights is None)
    functions = [graph, _builder(model, task)(mode="step", max_len=seq_len, **shape)] if step else [graph]
    if precision is not None:
        functions = [with_precision(function, precision) for function in functions]
    resolved = resolve_target(target, threads) if into.NEEDS_TARGET else None
    if resolved is not None and not strassen:
        resolved = resolved.without_strassen()
    return into.export(
        functions[0],
        _weights(graph, own_weights if weights is None else weights, seed),
        Path(path),
        step=functions[1] if step else None,
        target=resolved,
        metadata=metadata,
    )


def load(
    path: str | Path, *, threads: int | None = None, self_test: bool = True, key: str | Path | None = None
) -> LoadedModel:
    """Load a compiled model; it takes and returns numpy arrays.

    Args:
        path: A `.nas` file.
        threads: Threads to run on; as many as it was compiled for where None.
        self_test: Run each function once and compare with the outputs kept inside.
        key: File with the public key whose owner must have signed it.

    Raises:
        ArtifactError: The file is damaged, of another format, not for this machine, or not signed with the key.
        InputError: `threads` does not fit this machine.
    """
    from codegen import runtime

    return runtime.load(path, threads=threads, self_test=self_test, key=key)


def verify(path: str | Path, *, key: str | Path | None = None) -> VerifyReport:
    """Check everything about a `.nas` file that can be checked on this machine.

    Args:
        path: A `.nas` file.
        key: File with the public key whose owner must have signed it.

    Raises:
        ArtifactError: The first thing that is wrong.
    """
    from codegen import runtime

    return runtime.verify(path, key=key)


def get_task(name: str, data: str | Path | None = None, **options: object) -> Task:
    """Make a task.

    Args:
        name: Key of the task, such as `char_lm`.
        data: File to use instead of the task's own data.
        options: Options of the task by name, such as `seq_len`.

    Raises:
        InputError: No such task or option.
        DataError: The data cannot be read.
    """
    from nas import tasks

    return tasks.get(name, data, **options)


def resolve_target(target: str | Target, threads: int | None = None) -> Target:
    """Return a target from its name and a number of threads.

    Raises:
        InputError: No such target, or not so many CPUs.
        TargetUnavailable: It is not to be had here.
    """
    if not isinstance(target, str):
        return target
    from codegen import targets

    return targets.get(target, threads=threads)


def build_graph(architecture: Architecture, task: str | Task | None, **shape: Any) -> Graph:
    """Return the graph of an architecture for a task.

    Args:
        architecture: What to build.
        task: Task or its name.
        shape: Keywords of `Architecture.graph`, such as `batch` and `seq_len`.

    Raises:
        InputError: There is no task.
    """
    if task is None:
        raise InputError(
            "an architecture alone has no inputs and outputs", expected="task=...", found="none", hint="name a task"
        )
    if isinstance(task, str):
        from nas import tasks

        task = tasks.get(task)
    return architecture.graph(task.signature, **shape)


def measured_shape(study: Study) -> dict[str, Any]:
    """Return the batch and length at which a study measures latency; empty where it measures none."""
    for metric in study.goals.metrics:
        if metric.source == "measured":
            return {name: size for name, size in metric.settings.items() if name in ("batch", "seq_len")}
    return {}


def _prepare(
    model: Any, task: str | Task | None, shape: dict[str, Any], with_weights: bool
) -> tuple[Graph, Weights | None, dict[str, Any]]:
    """Return the graph of a model, the weights that belong to it, and what to record in the artifact."""
    from codegen.artifact import Artifact
    from ir.graph import Graph
    from nas.trial import Trial

    if isinstance(model, Trial):
        if model.study is None:
            raise InputError(
                "a trial without a study has neither weights nor a task",
                where=f"trial {model.number}",
                expected="a trial of a study",
                found="one made by hand",
                hint="take it from nas.search, nas.load_study(...).trials or study.best()",
            )
        return _prepare_trial(model, model.study, shape, with_weights)
    if isinstance(model, Artifact):
        from ir.serialize import graph_from_json

        return graph_from_json(model.graph_json), model.parameters, dict(model.metadata)
    if isinstance(model, Graph):
        return model, None, {}
    if hasattr(model, "graph") and hasattr(model, "to_dict"):
        return build_graph(model, task, **shape), None, {"architecture": model.to_dict()}
    raise InputError(
        "this cannot be compiled",
        where="model",
        expected="a trial, an architecture, a graph or an artifact",
        found=type(model).__name__,
        hint="load a run with nas.load_study, or a space with nas.load_space",
    )


def _sizes(given: int | Sequence[int] | None) -> list[int]:
    if given is None:
        return []
    return [given] if isinstance(given, int) else list(given)


def _sources(
    model: Any, task: str | Task | None, graph: Graph, sizes: Mapping[str, list[int]], *, step: bool, prefill: bool
) -> dict[str, Source]:
    """Return the functions that an artifact of a model gets."""
    from codegen.artifact import Artifact
    from codegen.compile import Source
    from codegen.manifest import FORWARD
    from ir.serialize import graph_from_json

    if isinstance(model, Artifact):
        roles = {function.role for function in model.functions.values()}
        missing = [role for role, wanted in (("step", step), ("prefill", prefill)) if wanted and role not in roles]
        if missing:
            raise InputError("the artifact has no such function", where=missing[0], found=", ".join(model.functions))
        return {
            name: Source(
                graph_from_json(function.graph_json),
                function.role,
                {spec.name: spec.axes for spec in (*function.inputs, *function.outputs) if spec.axes is not None},
                function.padded,
            )
            for name, function in model.functions.items()
        }
    if not (step or prefill) and all(len(those) < 2 for those in sizes.values()):
        return {FORWARD: Source(graph)}
    from nas.functions import make_sources

    return make_sources(_builder(model, task), sizes["batch"], sizes["seq_len"], step=step, prefill=prefill)


def _builder(model: Any, task: str | Task | None) -> Callable[..., Graph]:
    """Return what builds the graphs of a trial or an architecture, given keywords of `Architecture.graph`."""
    from nas.trial import Trial

    if isinstance(model, Trial):
        assert model.study is not None  # `_prepare` refuses one without
        study, context = model.study, model.study.evaluator.context(model.architecture, model.number)
        return lambda **options: context.graph("artifact", **(measured_shape(study) | options))
    if hasattr(model, "graph") and hasattr(model, "to_dict"):
        return lambda **options: build_graph(model, task, **options)
    raise InputError(
        "only one function of this model is known",
        where="step, prefill, batch or seq_len",
        expected="a trial or an architecture",
        found=type(model).__name__,
        hint="a graph of one step can be written by itself",
    )


def _prepare_trial(
    trial: Trial, study: Study, shape: dict[str, Any], with_weights: bool
) -> tuple[Graph, Weights | None, dict[str, Any]]:
    from nas.ship import load_weights

    context = study.evaluator.context(trial.architecture, trial.number)
    graph = context.graph("artifact", **(measured_shape(study) | shape))
    described = {"trial": trial.number, "hash": trial.hash, "values": trial.values, "units": trial.units}
    described |= {"sources": trial.sources, "architecture": dict(trial.encoded)}
    return graph, load_weights(study, trial, graph) if with_weights else None, described


def _weights(graph: Graph, given: Weights | None, seed: int) -> Weights:
    """Return the weights given, checked to fit the graph, or fresh ones."""
    if given is None:
        from ir.initializers import initialize

        return initialize(graph, seed)
    for name, node in graph.parameters.items():
        found = given.get(name)
        if found is None or found.shape != node.types[0].shape:
            raise InputError(
                "the weights do not fit the model",
                where=name,
                expected=str(list(node.types[0].shape)),
                found="no such weight" if found is None else str(list(found.shape)),
            )
    return given
