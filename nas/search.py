"""One call from a space to a study: `search` runs it, `open_study` only opens it, `load_study` only looks at it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import InputError
from nas.budget import Budget
from nas.callbacks import AnyCallback
from nas.devices import use_device
from nas.evaluate import Evaluator
from nas.executors.base import Executor
from nas.goals import AnyObjective, Goals, as_objective
from nas.objectives.base import Objective
from nas.objectives.flops import Flops
from nas.objectives.latency import Latency
from nas.objectives.params import Params
from nas.objectives.predicted_latency import PredictedLatency, predict_instead
from nas.objectives.quality import Quality
from nas.objectives.recorded import Recorded
from nas.objectives.state_bytes import StateBytes
from nas.profile import require_measurable
from nas.proposals import Hash, hash_encoded
from nas.settings import check_header, describe_settings
from nas.storages.base import Storage
from nas.storages.journal import Journal, read_journal
from nas.storages.memory import Memory
from nas.strategies import base as strategies
from nas.strategies.base import Strategy
from nas.study import Study

if TYPE_CHECKING:
    from codegen.devices.client import Device
    from codegen.targets.base import Target
    from nas.tasks.base import Task

DEFAULT_TRIALS = 32


def search(
    space: Any,
    *,
    task: str | Task | None = None,
    target: str | Target = "cpu",
    objectives: Sequence[AnyObjective] | None = None,
    constraints: Iterable[Objective] = (),
    strategy: str | Strategy = "predictor_guided",
    budget: int | Budget = DEFAULT_TRIALS,
    executor: str | Executor = "serial",
    storage: str | Path | Storage | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str | Device | None = None,
    callbacks: Iterable[AnyCallback] = (),
    hash_of: Hash | None = None,
) -> Study:
    """Search a space for the Pareto front of its objectives.

    Args:
        space: Search space, or its shipped name or path.
        task: Task or its name; None takes the space's own where an objective needs one.
        target: Target or its name.
        objectives: Objectives, their names, or functions of an architecture; None takes quality and latency.
        constraints: Objectives with bounds, besides those of the space.
        strategy: What proposes, or its name.
        budget: Limits, or a number of trials.
        executor: Where trials run, or its name.
        storage: Run folder; one that holds this study resumes it. None keeps the study in this process.
        seed: Decides every random choice.
        threads: Threads that a compiled model may use; None leaves it to the target.
        device: Where latency is measured, `host:port` of `nas device serve`; None is this machine. The target `cpu` is
            then the device's.
        callbacks: What to call on the way: callbacks, or functions of the study and each ended trial.
        hash_of: Canonical hash of an architecture; None takes that of its graph, or of its choices where it has none.

    Returns:
        The study; its storage is free for other processes, and taken up again by its methods where they need it.

    Raises:
        InputError: An argument is wrong, or the folder holds a study with other settings.
        TargetUnavailable: There is nothing to measure on.
        StorageError: The run folder cannot be used.
    """
    study = open_study(
        space,
        task=task,
        target=target,
        objectives=objectives,
        constraints=constraints,
        strategy=strategy,
        storage=storage,
        seed=seed,
        threads=threads,
        device=device,
        hash_of=hash_of,
    )
    with study:
        study.run(budget, executor=executor, callbacks=callbacks)
    return study


def open_study(
    space: Any,
    *,
    task: str | Task | None = None,
    target: str | Target = "cpu",
    objectives: Sequence[AnyObjective] | None = None,
    constraints: Iterable[Objective] = (),
    strategy: str | Strategy = "predictor_guided",
    storage: str | Path | Storage | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str | Device | None = None,
    hash_of: Hash | None = None,
) -> Study:
    """Open a study without running it; arguments and errors are those of `search`.

    Everything is checked before the first byte is written.

    Returns:
        A study for `ask` and `tell`, or `run`.
    """
    if type(seed) is not int or seed < 0:
        raise InputError("bad seed", where="seed", expected="an integer of at least 0", found=repr(seed))
    space = _resolve_space(space)
    wanted = [as_objective(objective) for objective in ([Quality(), Latency()] if objectives is None else objectives)]
    demanded = [*space_constraints(space), *constraints]
    predicted = next((item for item in (*wanted, *demanded) if isinstance(item, PredictedLatency)), None)
    demanded = demanded if predicted is None else predict_instead(predicted, demanded)
    if any(item.needs_task for item in (*wanted, *demanded)) or isinstance(task, str):
        task = resolve_task(task, space)
    task = None if isinstance(task, str) else task
    wanted = [with_suggestions(objective, space, task) for objective in wanted]
    device, target = use_device(device, target, threads)
    evaluator = Evaluator(Goals.of(wanted, demanded, task), task, target, threads, seed, device)
    if device is None and any(item.source == "measured" and item.needs_task for item in evaluator.goals.metrics):
        require_measurable(evaluator.context(None).resolve_target())
    _check_cold_caches(evaluator)
    proposer = strategies.get(strategy)
    proposer.bind(space, evaluator)  # what it cannot serve is an error before a folder is made
    settings = describe_settings(space, evaluator, proposer)
    return Study(
        space,
        evaluator,
        strategy=proposer,
        hash_of=hash_of or graph_hash(task),
        storage=Journal(storage) if isinstance(storage, (str, Path)) else storage,
        settings=settings,
    )


def _check_cold_caches(evaluator: Evaluator) -> None:
    cold = any(isinstance(item, Latency) and item.cold_cache for item in evaluator.goals.metrics)
    if cold and (target := evaluator.context(None).resolve_target()).gpu is None:
        raise InputError(
            "only the cache of a GPU is overwritten before calls",
            where="cold_cache",
            expected="a target such as cuda",
            found=target.name,
        )


def load_study(folder: str | Path, *, hold: bool = False, device: str | Device | None = None) -> Study:
    """Open a study for reading, without holding its folder: its trials, front and files.

    Args:
        folder: Run folder.
        hold: Take the folder, so that what is recorded of the study reaches its journal; close the study then.
        device: Where latency is measured again, for a study that was measured on a device.

    Returns:
        The study as it is now; it cannot be run.

    Raises:
        StorageError: The folder holds no readable study.
        InputError: Its task or space is not to be had here.
        TargetUnavailable: The device cannot be reached.
    """
    records = read_journal(folder)
    check_header(records[0], str(folder))
    header = records[0]
    settings = header["settings"]
    objectives, constraints = ([Recorded.of(item) for item in settings[key]] for key in ("objectives", "constraints"))
    target = settings["target"] or {"name": "cpu", "threads": None}
    device, measured_on = use_device(device, target["name"], target["threads"])
    evaluator = Evaluator(
        Goals.of(objectives, constraints),
        _recorded_task(settings["task"], header.get("data")),
        measured_on,
        target["threads"],
        settings["seed"],
        device,
    )
    space = _recorded_space(settings["space"]["name"], header["space"])
    storage = Journal(folder) if hold else Memory(records, Path(folder))
    return Study(space, evaluator, storage=storage, settings=settings)


def graph_hash(task: Task | None) -> Hash:
    """Return the hash of an architecture's graph for a task, or of its choices where there is no graph."""

    def hash_of(architecture: Any) -> str:
        if task is None or not hasattr(architecture, "canonical_hash"):
            return hash_encoded(architecture)
        return architecture.canonical_hash(task.signature)

    return hash_of


def space_constraints(space: Any) -> list[Objective]:
    """Return the constraints that a space itself demands, as objectives with bounds.

    Raises:
        InputError: It bounds a metric that has no objective, or latency from below.
    """
    demanded: list[Objective] = []
    counted = {"params": Params, "flops": Flops, "state_bytes": StateBytes}
    for constraint in getattr(space, "constraints", ()):
        if constraint.metric in counted:
            demanded.append(counted[constraint.metric](min=constraint.minimum, max=constraint.maximum))
        elif constraint.metric == "latency_ms" and constraint.minimum is None:
            demanded.append(Latency(max_ms=constraint.maximum))
        else:
            raise InputError(
                "this constraint of the space cannot be kept",
                where=str(getattr(space, "source", "")),
                expected="a bound on params, flops, state_bytes, or a maximum of latency_ms",
                found=constraint.metric,
            )
    return demanded


def _resolve_space(space: Any) -> Any:
    if not isinstance(space, (str, Path)):
        return space
    from searchspaces.space import load_space

    return load_space(space)


def resolve_task(task: str | Task | None, space: Any) -> Task:
    """Return a task; its data and length are the space's where the task is the space's own.

    Raises:
        InputError: There is none, or no such task.
    """
    from nas import tasks

    if task is not None and not isinstance(task, str):
        return task
    own = getattr(space, "task", None)
    name = task or own
    if name is None:
        raise InputError("these objectives need a task", expected="one of " + ", ".join(tasks.names()), found="none")
    seq_len = getattr(space, "seq_len", None) if name == own else None
    options = {"seq_len": seq_len} if seq_len is not None and "seq_len" in tasks.option_names(name) else {}
    return tasks.get(name, data=getattr(space, "data", None) if name == own else None, **options)


def with_suggestions(objective: Objective, space: Any, task: Task | None) -> Objective:
    """Return the objective with the space's training settings where the user gave none."""
    suggested = getattr(space, "training", None)
    if not isinstance(objective, Quality) or suggested is None or task is None:
        return objective
    if suggested.steps is not None and (objective.steps, objective.tokens, objective.seconds) == (None, None, None):
        objective = replace(objective, steps=suggested.steps)
    given = {"batch_size": suggested.batch_size, "learning_rate": suggested.learning_rate}
    given = {name: value for name, value in given.items() if value is not None}
    if given and objective.options is None:
        from nas.training.budget import TrainOptions

        objective = replace(objective, options=replace(TrainOptions.for_signature(task.signature), **given))
    return objective


def _recorded_task(recorded: dict[str, Any] | None, data: str | None) -> Task | None:
    if recorded is None:
        return None
    from nas import tasks

    options = {name: value for name, value in recorded.items() if name not in ("name", "sha256")}
    return tasks.get(recorded["name"], data=data, **options)


def _recorded_space(name: str, text: str) -> Any:
    """Return the space of a journal, or one that only shows what was chosen where it came from no file."""
    if "schema:" not in text:
        return _Unknown()
    from searchspaces.space import load_space

    with tempfile.TemporaryDirectory(prefix="nas-space-") as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return load_space(path)


class _Unknown:
    """A space made in Python, which a journal does not hold: architectures are what was stored of them."""

    def architecture(self, data: dict[str, Any]) -> dict[str, Any]:
        return data
