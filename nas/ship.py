"""Compile the winners of a study with their trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ir.errors import InputError, NasError
from nas.callbacks import Callback
from nas.evaluate import concerns_study
from nas.objectives.latency import timing_of
from nas.objectives.quality import WEIGHTS_FILE
from nas.profile import is_measurable
from nas.study import Study
from nas.trial import Trial

FOLDER_NAME = "artifacts"
_TIMED = ("measured", "predicted")


def ship(study: Study, *, opt_level: int = 1, callback: Callback | None = None) -> dict[int, Path]:
    """Compile, verify, measure and save every trial of the front; what lies there already is left alone.

    Args:
        study: A study with a run folder.
        opt_level: Effort of the compiler.
        callback: Hears of stages, and of a trial that cannot be compiled.

    Returns:
        Path of each artifact by trial number; a trial that could not be compiled is missing.

    Raises:
        InputError: The study has no run folder.
        StorageError: An artifact could not be written.
    """
    if study.folder is None:
        raise InputError("a study without a run folder has no place for artifacts", hint="give the search a storage")
    callback = callback or Callback()
    _remove_half_written(study.folder / FOLDER_NAME)
    shipped: dict[int, Path] = {}
    for trial in study.pareto_front():
        path = study.folder / FOLDER_NAME / f"trial_{trial.number}.nas"
        if trial.artifact is None or not path.is_file():
            try:
                compile_trial(study, trial, path, opt_level=opt_level, callback=callback)
            except NasError as error:
                if concerns_study(error):
                    raise
                path.unlink(missing_ok=True)  # it may have been saved before it failed its measurement
                study.record_unshipped(trial.number, f"{type(error).__name__}: {error}")
                callback.on_notice(f"trial {trial.number} has no artifact: {error}")
                continue
            study.record_artifact(trial.number, f"{FOLDER_NAME}/{path.name}")
        shipped[trial.number] = path
    return shipped


def compile_trial(
    study: Study,
    trial: Trial,
    path: Path,
    *,
    opt_level: int = 1,
    tuning_trials: int = 0,
    callback: Callback | None = None,
) -> None:
    """Compile one trial with its trained weights, verify and save it, and record its latency where it runs here.

    Args:
        study: The trial's study, with a task.
        trial: What to compile.
        path: Where to save it.
        opt_level: Effort of the compiler.
        tuning_trials: Candidate schedules to try, for the higher levels.
        callback: Hears of stages.

    Raises:
        CompileError: It cannot be compiled.
        VerificationError: The compiled model disagrees with its reference.
        StorageError: The file could not be written.
    """
    from codegen.artifact import record_latency
    from codegen.compile import compile_graph

    callback = callback or Callback()
    context = study.evaluator.context(trial.architecture, trial.number)
    graph = context.graph("artifact", **_latency_settings(study))
    target = context.resolve_target()
    callback.on_stage(trial.number, "compiling")
    artifact = compile_graph(
        graph,
        load_weights(study, trial, graph),
        target,
        opt_level=opt_level,
        tuning_trials=tuning_trials,
    )
    described = {"trial": trial.number, "hash": trial.hash, "values": trial.values, "units": trial.units}
    described |= {"sources": trial.sources, "architecture": dict(trial.encoded)}
    replace(artifact, metadata={**artifact.metadata, **described}).save(path)
    if context.device is None and not is_measurable(target):
        return
    callback.on_stage(trial.number, "measuring")
    timing = timing_of(_timed_settings(study))
    record_latency(path, context.timer.measure_latency(path, threads=context.threads, **timing).to_dict())


def load_weights(study: Study, trial: Trial, graph: Any) -> dict[str, Any]:
    """Return a trial's trained weights, or initial ones where the study trains nothing."""
    data = study.read_file(trial.number, WEIGHTS_FILE)
    if data is None:
        from ir.initializers import initialize

        return initialize(graph, study.evaluator.seed)
    from safetensors.numpy import load

    return load(data)


def _remove_half_written(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote an artifact; the study's folder is held meanwhile."""
    for path in folder.glob(".*.nas.*.tmp"):
        path.unlink(missing_ok=True)


def _latency_settings(study: Study) -> dict[str, Any]:
    """Return the batch and length whose time the study judges, one whole sequence where it judges none."""
    given = _timed_settings(study).items()
    return {"batch": 1, "seq_len": None} | {name: value for name, value in given if name in ("batch", "seq_len")}


def _timed_settings(study: Study) -> Mapping[str, Any]:
    """Return the settings of what is timed first, empty where nothing is."""
    return next((metric.settings for metric in study.goals.metrics if metric.source in _TIMED), {})
