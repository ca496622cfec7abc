"""What a MODEL argument names: a run, an artifact, a graph, or an architecture of a space."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from ir.graph import Graph
    from nas.study import Study
    from nas.tasks.base import Task
    from nas.trial import Trial
    from searchspaces.architecture import Architecture
    from searchspaces.space import Space

GRAPH_SUFFIXES = (".json", ".txt", ".graph", ".ir")
_PICKS = ("smallest", "centroid", "largest")


@dataclass(frozen=True)
class Model:
    """Something that `nas.compile` takes, and what a user should know about it.

    Attributes:
        model: Trial, architecture, graph or artifact.
        name: Short name, fit for a file.
        title: What it is, for people.
        study: Study of a trial.
        task: Task of an architecture.
        is_trained: Whether its weights are trained ones.
    """

    model: Any
    name: str
    title: str
    study: Study | None = None
    task: Task | None = None
    is_trained: bool = True


def is_artifact(text: str) -> bool:
    """Tell whether an argument names an artifact file."""
    return Path(text).suffix == ".nas"


def is_run(text: str) -> bool:
    """Tell whether an argument names a folder; only runs are folders."""
    return Path(text).is_dir()


def is_graph(text: str) -> bool:
    """Tell whether an argument names a graph file."""
    return Path(text).suffix in GRAPH_SUFFIXES


def open_run(folder: str) -> Study:
    """Open a run folder for reading.

    Raises:
        InputError: It holds no study.
        StorageError: Its journal cannot be read.
    """
    from nas.search import load_study
    from nas.storages.journal import JOURNAL_NAME

    if not (Path(folder) / JOURNAL_NAME).exists():
        raise InputError(
            "this folder holds no run",
            where=folder,
            expected=f"a file {JOURNAL_NAME} in it",
            hint="give the folder that `nas search --out` wrote",
        )
    return load_study(folder)


def find_model(text: str, *, trial: int | None = None, pick: str = "centroid") -> Model:
    """Return what an argument names, ready to be compiled.

    Args:
        text: Run folder, artifact, graph file, or search space.
        trial: Number of the trial of a run; the first of its front where None.
        pick: Which architecture of a space.

    Raises:
        InputError: It names nothing, or `trial` does not fit what it names.
    """
    if is_run(text):
        return _trial_of(text, trial)
    if trial is not None:
        raise InputError("only a run has trials", where="--trial", expected="a run folder", found=text)
    path = Path(text)
    if is_artifact(text):
        from codegen import artifact

        return Model(artifact.read(path), path.stem, f"artifact {path}")
    if is_graph(text):
        return Model(read_graph(path), path.stem, f"graph {path}", is_trained=False)
    from searchspaces.space import load_space

    space = load_space(text)
    architecture = pick_architecture(space, pick)
    title = f"{pick} architecture of {space.name}: {architecture.describe()}"
    return Model(architecture, space.name, title, task=task_of(space), is_trained=False)


def find_trial(study: Study, number: int | None) -> Trial:
    """Return a trial of a study: a finished one by number, or the first of its front.

    Raises:
        InputError: No such trial, or it did not finish.
    """
    if number is None:
        return study.best()
    if number >= len(study.trials):
        count = len(study.trials)
        raise InputError("no such trial", where="--trial", expected=f"0 to {count - 1}", found=str(number))
    trial = study.trials[number]
    if trial.state != "finished":
        raise InputError("this trial has no result", where=f"trial {number}", found=f"{trial.state} {trial.reason}")
    return trial


def pick_architecture(space: Space, pick: str) -> Architecture:
    """Return the architecture of a space that a word or a seed stands for.

    Raises:
        InputError: Neither.
    """
    if pick in _PICKS:
        return getattr(space, pick)()
    if not (pick.isascii() and pick.isdigit()):
        raise InputError(
            "this picks no architecture",
            where="--pick",
            expected=f"{', '.join(_PICKS)}, or a whole number as the seed of a sample",
            found=repr(pick),
            hint=did_you_mean(pick, _PICKS),
        )
    import numpy as np

    return space.sample(np.random.default_rng(int(pick)))


def task_of(space: Space) -> Task:
    """Return the task of a space, with its data and length."""
    from nas import tasks
    from nas.tasks._shapes import Shapes

    if space.signature is not None:
        return Shapes(space.signature)
    takes_length = space.seq_len is not None and "seq_len" in tasks.option_names(space.task)
    options = {"seq_len": space.seq_len} if takes_length else {}
    return tasks.get(space.task, data=space.data, **options)


def read_graph(path: Path) -> Graph:
    """Read a graph from JSON or from its text form.

    Raises:
        InputError: The file cannot be read, or holds no graph.
    """
    from ir.serialize import graph_from_json
    from ir.text import parse_graph

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError("cannot read the graph", where=str(path), expected="a text file", found=reason) from error
    read = graph_from_json if path.suffix == ".json" else parse_graph
    return read(text, source=str(path))


def _trial_of(folder: str, number: int | None) -> Model:
    from nas.objectives.quality import WEIGHTS_FILE

    study = open_run(folder)
    trial = find_trial(study, number)
    return Model(
        trial,
        f"trial_{trial.number}",
        f"trial {trial.number} of {folder}",
        study=study,
        is_trained=study.read_file(trial.number, WEIGHTS_FILE) is not None,
    )
