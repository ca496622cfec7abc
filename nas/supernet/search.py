"""A search that ranks by a supernet: train it, audit it, fall back where it fails, and train the winners alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ir.errors import InputError, StorageError
from ir.files import replace_file
from nas.evaluate import Evaluator
from nas.front import nominal_front
from nas.goals import Goals
from nas.objectives.base import Objective
from nas.objectives.quality import WEIGHTS_FILE, Quality
from nas.objectives.supernet_quality import SupernetQuality
from nas.supernet.audit import ANCHORS, LEAST_TAU, Audit, audit_supernet, draw_anchors
from nas.supernet.finalists import Pair, next_finalist
from nas.training.budget import TrainOptions
from nas.training.fit import Progress
from nas.trial import Quantity, Trial

if TYPE_CHECKING:
    from nas.study import Study
    from nas.tasks.base import Task
    from searchspaces.architecture import Architecture
    from searchspaces.space import Space

SUPERNET_FILE: Final = "supernet.safetensors"
AUDIT_FILE: Final = "supernet_audit.json"
STEPS_PER_STEP: Final = 3  # of the supernet, for each step of a model alone

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """What a search is to judge quality by.

    Attributes:
        objective: Scores of the supernet, or of training where the audit says that they do not rank.
        audit: How well the supernet's scores rank.
        anchors: The architectures that the audit trained alone.
    """

    objective: Objective
    audit: Audit
    anchors: tuple[Architecture, ...]

    @property
    def pairs(self) -> list[Pair]:
        """The anchors with both scores."""
        scores = zip(self.anchors, self.audit.supernet, self.audit.alone, strict=True)
        return [(anchor.to_dict(), shared, alone) for anchor, shared, alone in scores]


def prepare_quality(
    space: Space,
    task: Task,
    quality: Quality,
    folder: str | Path,
    *,
    seed: int,
    steps: int | None = None,
    constraints: Iterable[Objective] = (),
    threads: int | None = None,
    anchors: int = ANCHORS,
    threshold: float = LEAST_TAU,
    notice: Notice | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Train a supernet for a search and audit it; what an interrupted call has done is not done again.

    Args:
        space: The space to search.
        task: Data and yardstick.
        quality: How models are trained alone: the anchors, the winners, and every trial after a failed audit.
        folder: Run folder, where the supernet and its audit are kept.
        seed: Seed of the study.
        steps: Updates of the supernet; None takes three times those of a model alone.
        constraints: Objectives with bounds; anchors break none that is cheap to check.
        threads: Torch threads while training.
        anchors: Architectures to train alone.
        threshold: Smallest Kendall tau with which the supernet may rank.
        notice: Told what the audit found.
        progress: Called after each update of the supernet.

    Returns:
        The objective to search with, and the audit.

    Raises:
        InputError: The steps cannot be told, the space has too few architectures, or the folder holds another supernet.
        StorageError: A file cannot be read or written.
    """
    from nas.supernet.train import train_supernet

    quality = quality.bind(task)
    options = quality.options or TrainOptions.for_signature(task.signature)
    steps = steps or STEPS_PER_STEP * _steps_alone(quality, options.batch_size * task.signature.positions)
    path = Path(folder).absolute() / SUPERNET_FILE
    supernet = train_supernet(
        space, task, steps, seed=seed, options=options, path=path, threads=threads, progress=progress
    )
    evaluator = Evaluator(Goals.of([quality], constraints, task), task, threads=threads, seed=seed)
    chosen = draw_anchors(space, anchors, seed=seed, is_excluded=evaluator.is_excluded)
    kept = _Kept(path.with_name(AUDIT_FILE), {"anchors": [anchor.to_dict() for anchor in chosen]} | quality.settings)
    audit = audit_supernet(
        supernet,
        task,
        chosen,
        quality.budget,
        seed=seed,
        options=quality.options,
        threads=threads,
        threshold=threshold,
        known=kept.read(),
        heard=kept.write,
    )
    notice = notice or (lambda message: None)
    notice(str(audit))
    if not audit.passes:
        notice("the supernet does not rank well enough: every candidate is trained instead")
        return Prepared(quality, audit, tuple(chosen))
    objective = SupernetQuality(path=str(path), steps=steps, min=quality.min, max=quality.max)
    return Prepared(objective.bind(task), audit, tuple(chosen))


def train_winners(
    study: Study, quality: Quality, prepared: Prepared, *, count: int | None = None, notice: Notice | None = None
) -> dict[int, Quantity]:
    """Train the most promising trials of a study alone, keep their weights, and record their scores.

    Each choice knows what training alone gave before, the anchors included; see `next_finalist`. A score is recorded as
    a second measurement, so it takes the place of the supernet's on the front; see `nas.front`.

    Args:
        study: A study whose quality a supernet gave.
        quality: How to train.
        prepared: What the supernet's audit found.
        count: How many to train; None takes as many as are on the front by the supernet's scores.
        notice: Told each score.

    Returns:
        The scores by trial number; those of an earlier call count and are not made again.

    Raises:
        StorageError: Weights or a score cannot be written.
    """
    quality = quality.bind(study.evaluator.task)
    scores = {t.number: score for t in study.trials if (score := alone_score(t, quality.name)) is not None}
    first = (trial.changed(remeasured={}) for trial in study.trials)
    wanted = len(nominal_front(first, study.goals)) if count is None else count
    while len(scores) < wanted:
        alone = {number: score.value for number, score in scores.items()}
        trial = next_finalist(study.trials, study.goals, quality.name, alone, prepared.pairs)
        if trial is None:
            break
        context = study.evaluator.context(trial.architecture, trial.number)
        started = time.monotonic()
        found = quality.evaluate(context)
        study.storage.write_file(trial.number, WEIGHTS_FILE, context.files[WEIGHTS_FILE])
        study.record_remeasured(trial.number, {quality.name: found}, time.monotonic() - started)
        scores[trial.number] = found
        if notice is not None:
            shared = trial.values.get(quality.name, float("nan"))
            notice(f"trial {trial.number}: {shared:.4g} by the supernet, {found.value:.4g} {found.unit} trained alone")
    return scores


def alone_score(trial: Trial, name: str) -> Quantity | None:
    """Return what a trial scored when it was trained alone after the search, None where it was not.

    Args:
        trial: Trial of a study whose quality a supernet gave.
        name: Name of the objective.
    """
    found = trial.remeasured.get(name)
    return found if found is not None and found.source == "trained" else None


def _steps_alone(quality: Quality, positions: int) -> int:
    """Updates of a model alone."""
    steps = quality.budget.total_steps(positions)
    if steps is None:
        raise InputError(
            "the steps of the supernet cannot be told from seconds",
            where="supernet_steps",
            expected="a number of steps",
            found=f"models alone are trained for {quality.budget}",
        )
    return steps


@dataclass(frozen=True)
class _Kept:
    """Scores of anchors on disk, for the same anchors and training only."""

    path: Path
    asked: dict[str, Any]

    def read(self) -> tuple[float, ...]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ()
        return tuple(map(float, data["alone"])) if data.get("asked") == json.loads(json.dumps(self.asked)) else ()

    def write(self, alone: Sequence[float]) -> None:
        text = json.dumps({"asked": self.asked, "alone": list(alone)})
        try:
            replace_file(self.path, text.encode())
        except OSError as error:
            raise StorageError(
                "the audit cannot be written", where=str(self.path), found=str(error.strerror)
            ) from error
