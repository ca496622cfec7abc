"""Train a supernet: `train_supernet(space, task, steps, seed=0)`. Imports torch."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ir.errors import InputError
from nas.settings import space_name, space_text
from nas.supernet.checkpoint import check_settings, read_checkpoint, restore, write_checkpoint
from nas.supernet.covering import covering_store
from nas.supernet.module import Supernet
from nas.supernet.sandwich import Sandwich
from nas.supernet.store import ParameterStore
from nas.tasks.base import IGNORED_TARGET, Batch, Task
from nas.training.budget import TrainOptions, learning_rate_factor
from nas.training.fit import (
    Progress,
    as_tensors,
    make_optimizer,
    non_finite_loss,
    require_seed,
    task_loss,
    torch_threads,
)
from searchspaces.architecture import Architecture
from searchspaces.space import Space

_DATA_STREAM: Final = 4  # with the next one apart from the streams that training one model derives from the same seed
_SANDWICH_STREAM: Final = 5


@dataclass(frozen=True)
class SupernetTraining:
    """What training a supernet is made of.

    Attributes:
        space: Whose architectures it is for.
        task: Data and yardstick.
        steps: Updates; each visits every architecture of its sandwich on one batch.
        seed: Seed of weights, data and sandwiches.
        options: Optimiser settings.
        sandwich: What a step visits.
    """

    space: Space
    task: Task
    steps: int
    seed: int
    options: TrainOptions
    sandwich: Sandwich

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result, as JSON."""
        described = {
            "space": describe_space(self.space),
            "task": describe_task(self.task),
            "steps": self.steps,
            "seed": self.seed,
            "options": asdict(self.options),
            "sandwich": asdict(self.sandwich),
        }
        return json.loads(json.dumps(described))

    def step(self, supernet: Supernet, optimizer: torch.optim.Optimizer, number: int) -> float:
        """Do one update; it depends on the weights, the optimiser's state and the step's number alone.

        Returns:
            The task's loss of the largest architecture.

        Raises:
            NonFiniteLoss: The loss or the gradient is NaN or infinite.
        """
        fraction = number / self.steps
        factor = learning_rate_factor(fraction, warmup=self.options.warmup, final_fraction=self.options.final_fraction)
        for group in optimizer.param_groups:
            group["lr"] = self.options.learning_rate * factor
        rng = np.random.default_rng([self.seed, _DATA_STREAM, number])
        batch = self.task.train_batch(rng, self.options.batch_size)
        drawn = self.sandwich.draw(self.space, np.random.default_rng([self.seed, _SANDWICH_STREAM, number]), fraction)
        optimizer.zero_grad(set_to_none=True)
        loss = self._backward(supernet, drawn, batch, number)
        norm = torch.nn.utils.clip_grad_norm_(supernet.weights.values(), self.options.grad_clip).item()
        if not math.isfinite(norm):
            raise non_finite_loss("gradient", norm, number)
        optimizer.step()
        return loss

    def _backward(self, supernet: Supernet, drawn: list[Architecture], batch: Batch, number: int) -> float:
        """Add up the gradients of a sandwich, each pass by itself; the largest's output teaches the others."""
        inputs, targets = as_tensors(batch.inputs), torch.from_numpy(batch.targets)
        teacher: Tensor | None = None
        first = math.nan
        for architecture in drawn:
            output = supernet.subnet(architecture).train()(**inputs)[self.task.signature.output_name]
            loss = task_loss(self.task, output, targets)
            if teacher is None:
                teacher, first = output.detach(), loss.item()
            elif self.sandwich.distill > 0:
                lesson = _distance(self.task, output, teacher, targets)
                loss = (1 - self.sandwich.distill) * loss + self.sandwich.distill * lesson
            if not math.isfinite(loss.item()):
                raise non_finite_loss("loss", loss.item(), number)
            (loss / len(drawn)).backward()
        return first


def train_supernet(
    space: Space,
    task: Task,
    steps: int,
    *,
    seed: int,
    options: TrainOptions | None = None,
    sandwich: Sandwich | None = None,
    path: str | Path | None = None,
    save_every: int = 50,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Supernet:
    """Train one set of weights for all architectures of a space.

    The result depends on the arguments alone, on one machine with one thread count: a training that was interrupted
    goes on from its file as if it had not been.

    Args:
        space: The space.
        task: Data and yardstick.
        steps: Updates, each of as many forward passes as the sandwich has members.
        seed: Decides weights, data and sandwiches.
        options: Optimiser settings; None takes the defaults of the task's modality.
        sandwich: What a step visits; None takes the usual.
        path: Where to keep it on the way and at the end; what lies there of the same training is gone on with.
        save_every: Updates between two writings.
        threads: Torch threads while training; None leaves the setting alone.
        progress: Called after each update with its number, the number of updates, and the largest model's loss.

    Returns:
        The trained supernet.

    Raises:
        NonFiniteLoss: The loss or a gradient became NaN or infinite.
        InputError: A bad seed or number, or the file holds another training.
        StorageError: The file cannot be read or written.
    """
    if type(steps) is not int or steps < 1:
        raise InputError("bad number of steps", where="steps", expected="a positive integer", found=repr(steps))
    training = SupernetTraining(
        space,
        task,
        steps,
        require_seed(seed),
        options or TrainOptions.for_signature(task.signature),
        sandwich or Sandwich(),
    )
    supernet = make_supernet(training)
    slots = supernet.store.slots
    optimizer = make_optimizer(
        ((slots[key].label, weight) for key, weight in supernet.weights.items()), training.options
    )
    file = None if path is None else Path(path)
    done = _resume(file, training, supernet, optimizer)
    with torch_threads(threads):
        for number in range(done + 1, steps + 1):
            loss = training.step(supernet, optimizer, number)
            if file is not None and (number % save_every == 0 or number == steps):
                write_checkpoint(file, supernet, optimizer, number, training.settings)
            if progress is not None:
                progress(number, steps, loss)
    return supernet


def make_supernet(training: SupernetTraining, store: ParameterStore | None = None) -> Supernet:
    """Return the supernet that a training begins with; `store` spares making it again."""
    store = store or covering_store(training.space, training.task.signature)
    values = store.initialize(training.seed)
    return Supernet(store, training.task.signature, batch=training.options.batch_size, values=values)


def load_supernet(path: str | Path, task: Task) -> Supernet:
    """Return the supernet of a finished training.

    Args:
        path: What `train_supernet` wrote.
        task: The task it learned.

    Raises:
        InputError: The file holds the supernet of another task, or one whose training was interrupted.
        StorageError: The file cannot be read.
    """
    checkpoint = read_checkpoint(Path(path))
    recorded = checkpoint.settings
    check_settings({"task": recorded.get("task")}, {"task": describe_task(task)}, str(path))
    if checkpoint.step < recorded["steps"]:
        raise InputError(
            "the training of this supernet was interrupted",
            where=str(path),
            expected=f"{recorded['steps']} steps",
            found=f"{checkpoint.step}",
            hint="give the same arguments to train_supernet to go on with it",
        )
    values = {key: checkpoint.tensors[key].numpy() for key in checkpoint.store.slots}
    return Supernet(checkpoint.store, task.signature, batch=recorded["options"]["batch_size"], values=values)


def describe_space(space: Space) -> dict[str, Any]:
    """Return what identifies a space, as JSON."""
    return {"name": space_name(space), "sha256": hashlib.sha256(space_text(space).encode()).hexdigest()}


def describe_task(task: Task) -> dict[str, Any]:
    """Return what identifies a task and its data, as JSON."""
    return json.loads(json.dumps({"name": task.name, **task.options, "sha256": task.fingerprint()}))


def _resume(path: Path | None, training: SupernetTraining, supernet: Supernet, optimizer: torch.optim.Optimizer) -> int:
    """Take up what an earlier process left, and return the number of updates that it did."""
    if path is None or not path.exists():
        return 0
    checkpoint = read_checkpoint(path)
    check_settings(checkpoint.settings, training.settings, str(path))
    restore(checkpoint, supernet, optimizer, str(path))
    return checkpoint.step


def _distance(task: Task, output: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """How far an output is from the teacher's where something is asked: divergence in nats, or mean squared error."""
    if task.loss_kind == "mse":
        return functional.mse_loss(output, teacher)
    asked = (targets != IGNORED_TARGET).flatten()
    ours, theirs = (logits.flatten(0, -2)[asked].log_softmax(-1) for logits in (output, teacher))
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
