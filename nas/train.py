"""Train one candidate on a task: `train(architecture, task, budget, seed=0)`. Imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from codegen.torch_backend import to_module
from ir.errors import NonFiniteLoss
from ir.initializers import initialize
from nas.tasks.base import Task, evaluate
from nas.training.budget import Budget, TrainOptions
from nas.training.fit import HistoryPoint, Progress, fit, make_predictor, require_seed, torch_threads
from searchspaces.architecture import Architecture

__all__ = ["Budget", "HistoryPoint", "Params", "Progress", "TrainOptions", "TrainResult", "train"]

Params: TypeAlias = dict[str, npt.NDArray[np.float32]]

_INITIALIZATION_STREAM: Final = 2  # apart from the order of the data, which is stream 1 of the same seed


@dataclass(frozen=True)
class TrainResult:
    """A trained candidate.

    Attributes:
        quality: The task's metric on its validation split.
        loss: Validation loss: cross entropy in nats, or mean squared error.
        params: Trained weights by name.
        parameters: Number of weights.
        steps: Updates done.
        seconds: Time spent in updates.
        history: Training loss on the way.
        checkpoint: What to go on from, where training stopped before the end of its budget.
    """

    quality: float
    loss: float
    params: Params
    parameters: int
    steps: int
    seconds: float
    history: tuple[HistoryPoint, ...]
    checkpoint: bytes | None = None


def train(
    architecture: Architecture,
    task: Task,
    budget: Budget,
    *,
    seed: int,
    trial: int = 0,
    options: TrainOptions | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    until: float = 1.0,
    resume: bytes | None = None,
) -> TrainResult:
    """Train a candidate from scratch and score it on the validation split.

    The batches depend on the seed alone, the initial weights on the seed and the trial. With a budget of steps or
    tokens the result repeats on one machine with one thread count; a budget of seconds does not.

    Args:
        architecture: The candidate.
        task: Data and yardstick.
        budget: How long.
        seed: Seed of the study.
        trial: Number of the trial in the study.
        options: Settings; None takes the defaults of the task's modality.
        threads: Torch threads while training; None leaves the setting alone.
        progress: Called after each update with its number, the expected total, and the loss.
        until: Stop after this part of the budget, and score what is there.
        resume: Checkpoint of an earlier part to go on from.

    Returns:
        Quality, weights and what training did.

    Raises:
        NonFiniteLoss: The loss or a gradient became NaN or infinite; ends the trial.
        InputError: A bad seed or thread count.
        StorageError: The checkpoint is damaged.
    """
    options = options or TrainOptions.for_signature(task.signature)
    graph = architecture.graph(task.signature, batch=options.batch_size)
    module = to_module(graph, params=initialize(graph, initialization_seed(seed, trial)))
    with torch_threads(threads):
        fitted = fit(module, task, budget, seed=seed, options=options, progress=progress, until=until, resume=resume)
        validation = evaluate(task, make_predictor(module, task), options.batch_size)
    if not (math.isfinite(validation.quality) and math.isfinite(validation.loss)):
        raise NonFiniteLoss(
            f"the validation loss is {validation.loss} after {fitted.steps} steps",
            where=f"trial {trial}",
            expected="a finite number",
            found=str(validation.loss),
        )
    params: Params = module.export_params()
    return TrainResult(
        quality=validation.quality,
        loss=validation.loss,
        params=params,
        parameters=sum(weight.size for weight in params.values()),
        steps=fitted.steps,
        seconds=fitted.seconds,
        history=fitted.history,
        checkpoint=fitted.checkpoint,
    )


def initialization_seed(seed: int, trial: int) -> int:
    """The seed of a trial's initial weights.

    Args:
        seed: Seed of the study.
        trial: Number of the trial.

    Returns:
        A 32-bit integer; trials and studies do not share streams.
    """
    return int(np.random.SeedSequence([require_seed(seed), _INITIALIZATION_STREAM, trial]).generate_state(1)[0])
