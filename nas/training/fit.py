"""The training loop: any module that maps named inputs to named outputs, any task."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ir.errors import InputError, NonFiniteLoss
from nas.tasks.base import IGNORED_TARGET, Array, Batch, Predict, Task
from nas.training import checkpoint
from nas.training.budget import Budget, TrainOptions, learning_rate_factor
from nas.training.checkpoint import Done

Progress: TypeAlias = Callable[[int, int, float], None]
Clock: TypeAlias = Callable[[], float]

_DATA_STREAM: Final = 1  # apart from the streams that others derive from the same seed
_HISTORY_POINTS: Final = 100
_ROUNDING: Final = 1e-6  # a third of 600 steps, written as a fraction, is not a step more than 200
_UNDECAYED: Final = frozenset({"bias", "decay", "embedding", "log", "norm", "position"})


@dataclass(frozen=True)
class HistoryPoint:
    """Training around one step.

    Attributes:
        step: Updates done.
        loss: Mean training loss since the previous point.
        learning_rate: Of this update.
    """

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class FitResult:
    """What a training loop did; the module holds the weights.

    Attributes:
        steps: Updates done.
        seconds: Time spent in them.
        history: Loss on the way, about 100 points.
        checkpoint: What to go on from, where the training stopped before the end of its budget.
    """

    steps: int
    seconds: float
    history: tuple[HistoryPoint, ...]
    checkpoint: bytes | None = None


def fit(
    module: torch.nn.Module,
    task: Task,
    budget: Budget,
    *,
    seed: int,
    options: TrainOptions,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
    until: float = 1.0,
    resume: bytes | None = None,
) -> FitResult:
    """Train a module in place.

    The order of the data depends on the seed alone: all candidates of a study see the same batches. With a budget of
    steps or tokens, the result is the same for the same weights, seed, machine and thread count.

    Args:
        module: `forward(**inputs)` returns a mapping that holds the signature's output.
        task: Where batches come from and what is minimised.
        budget: When to stop.
        seed: Seed of the study.
        options: Batch, optimiser and schedule.
        progress: Called after each update with its number, the expected total, and the loss.
        clock: Seconds, monotonic.
        until: Stop after this part of the budget; schedules run as for the whole of it, so that a training in parts
            gives what it gives in one go.
        resume: Checkpoint to go on from.

    Returns:
        Updates, time and history, of earlier parts too.

    Raises:
        NonFiniteLoss: The loss or the gradient is NaN or infinite; names the step.
        StorageError: The checkpoint is damaged, or of another model.
    """
    rng = np.random.default_rng([require_seed(seed), _DATA_STREAM])
    optimizer = make_optimizer(module.named_parameters(), options)
    before = Done() if resume is None else checkpoint.read(resume, module, optimizer, rng)
    history = _History(before.points)
    start = clock()
    module.train()
    done = before.steps
    total = budget.total_steps(options.batch_size * task.signature.positions)
    for step, expected_total, fraction in _pace(_Span(total, budget.seconds, until, before), clock):
        factor = learning_rate_factor(fraction, warmup=options.warmup, final_fraction=options.final_fraction)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * factor
        loss = _update(module, optimizer, task, task.train_batch(rng, options.batch_size), options.grad_clip, step)
        history.add(step, loss, options.learning_rate * factor, expected_total)
        done = step
        if progress is not None:
            progress(step, expected_total, loss)
    seconds, points = before.seconds + clock() - start, history.finish()
    if until >= 1:
        return FitResult(done, seconds, points)
    reached = Done(done, seconds, tuple(astuple(point) for point in points))
    return FitResult(done, seconds, points, checkpoint.write(module, optimizer, rng, reached))


def make_predictor(module: torch.nn.Module, task: Task) -> Predict:
    """Wrap a module as a numpy function, for `nas.tasks.evaluate`.

    Args:
        module: As in `fit`; put into evaluation mode.
        task: Whose signature names the output.

    Returns:
        Inputs by name to logits or forecast.
    """
    module.eval()

    def predict(inputs: Mapping[str, Array]) -> Array:
        with torch.inference_mode():
            return module(**as_tensors(inputs))[task.signature.output_name].numpy()

    return predict


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Set torch's thread count for a while; None leaves it alone.

    Args:
        threads: Threads within an operation.

    Raises:
        InputError: Not a positive integer.
    """
    if threads is None:
        yield
        return
    if type(threads) is not int or threads < 1:
        raise InputError("bad thread count", where="threads", expected="a positive integer", found=repr(threads))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require_seed(seed: int) -> int:
    """Check a seed.

    Args:
        seed: What the user gave.

    Returns:
        The seed.

    Raises:
        InputError: Not an integer, or negative.
    """
    if type(seed) is not int or seed < 0:
        raise InputError("bad seed", where="seed", expected="an integer of at least 0", found=repr(seed))
    return seed


def decays(name: str, dimensions: int) -> bool:
    """Whether weight decay applies to a parameter: matrices that mix features, and nothing else.

    Args:
        name: Its path.
        dimensions: How many it has.

    Returns:
        False for vectors and for whatever a word of the path calls a norm, an embedding, a position, a bias, a decay or
        a logarithm (the state matrix of Mamba).
    """
    return dimensions >= 2 and not _UNDECAYED & set(re.split(r"[^a-z]+", name.lower()))


def make_optimizer(weights: Iterable[tuple[str, nn.Parameter]], options: TrainOptions) -> torch.optim.AdamW:
    """Make AdamW for weights by name, which decides what decays.

    Args:
        weights: Names and weights; those that need no gradient are left out.
        options: Its settings.

    Returns:
        The optimiser; its learning rate is the peak.
    """
    trainable = [(name, weight) for name, weight in weights if weight.requires_grad]
    groups = [
        {
            "params": [weight for name, weight in trainable if decays(name, weight.ndim) is decayed],
            "weight_decay": options.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=options.learning_rate, betas=(options.beta1, options.beta2), fused=True)


@dataclass(frozen=True)
class _Span:
    """The part of a budget that is trained now: its limit in steps or seconds, where it ends, and what was before."""

    total: int | None
    seconds: float | None
    until: float
    before: Done


def _pace(span: _Span, clock: Clock) -> Iterator[tuple[int, int, float]]:
    """Number of each step, expected number of steps, and fraction of the budget used when it ends."""
    if span.total is not None:
        last = min(span.total, max(1, math.ceil(span.total * span.until - _ROUNDING)))
        yield from ((step, span.total, step / span.total) for step in range(span.before.steps + 1, last + 1))
        return
    if span.seconds is None:
        raise AssertionError("a budget has a limit")
    start = clock() - span.before.seconds
    elapsed = last_elapsed = span.before.seconds
    step = span.before.steps
    while step == 0 or elapsed < span.seconds * span.until:
        step += 1
        fraction = min(1.0, (2 * elapsed - last_elapsed) / span.seconds)  # as if this step took as long as the last
        yield step, max(step, round(step / fraction) if fraction else step), fraction
        last_elapsed, elapsed = elapsed, clock() - start


def _update(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, task: Task, batch: Batch, grad_clip: float, step: int
) -> float:
    output = module(**as_tensors(batch.inputs))[task.signature.output_name]
    loss = task_loss(task, output, torch.from_numpy(batch.targets))
    value = loss.item()
    if not math.isfinite(value):
        raise non_finite_loss("loss", value, step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), grad_clip).item()
    if not math.isfinite(norm):
        raise non_finite_loss("gradient", norm, step)
    optimizer.step()
    return value


def task_loss(task: Task, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What training on a task minimises, the mean over a batch: cross entropy in nats, or the squared error."""
    if task.loss_kind == "mse":
        return functional.mse_loss(output, targets)
    return functional.cross_entropy(output.flatten(0, -2), targets.flatten().long(), ignore_index=IGNORED_TARGET)


def non_finite_loss(what: str, found: float, step: int) -> NonFiniteLoss:
    """Return the error that says what of training became NaN or infinite, and when."""
    return NonFiniteLoss(
        f"the training {what} became {found} at step {step}",
        where=f"step {step}",
        expected="a finite number",
        found=str(found),
        hint="a lower learning rate or a longer warm-up may help",
    )


def as_tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Return arrays by name as tensors; they share memory where they can."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


class _History:
    """Collects mean losses, about `_HISTORY_POINTS` of them whatever the length."""

    def __init__(self, points: Iterable[tuple[int, float, float]] = ()) -> None:
        self._points = [HistoryPoint(*point) for point in points]
        self._losses: list[float] = []
        self._last = (0, 0.0)

    def add(self, step: int, loss: float, learning_rate: float, expected_total: int) -> None:
        self._losses.append(loss)
        self._last = (step, learning_rate)
        if len(self._losses) >= max(1, expected_total // _HISTORY_POINTS):
            self._close()

    def _close(self) -> None:
        step, learning_rate = self._last
        self._points.append(HistoryPoint(step, float(np.mean(self._losses)), learning_rate))
        self._losses.clear()

    def finish(self) -> tuple[HistoryPoint, ...]:
        if self._losses:
            self._close()
        return tuple(self._points)
