"""What a task is: data, signature, metric, chance level and trivial baselines, all in numpy."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ir.errors import DataError, InputError
from searchspaces.signature import Signature

Array: TypeAlias = npt.NDArray[Any]
Direction: TypeAlias = Literal["min", "max"]
LossKind: TypeAlias = Literal["cross_entropy", "mse"]
Predict: TypeAlias = Callable[[Mapping[str, Array]], Array]

IGNORED_TARGET: Final = -1
"""A class target that counts neither in the loss nor in the metric."""

MAX_DATA_BYTES: Final = 1 << 30
"""Larger data files are refused: tasks hold their data in memory, once per worker process."""


@dataclass(frozen=True)
class Metric:
    """Name and unit of what a task measures."""

    name: str
    unit: str


@dataclass(frozen=True)
class Batch:
    """Examples for one step.

    Attributes:
        inputs: Model inputs by name.
        targets: int32 classes (`IGNORED_TARGET` where none is asked) or float32 values to forecast.
        valid: Leading rows that count; later rows pad the batch to its size.
    """

    inputs: dict[str, Array]
    targets: Array
    valid: int


@dataclass(frozen=True)
class Evaluation:
    """A model on the whole validation split, each example counted once.

    Attributes:
        quality: The task's metric.
        loss: Mean cross entropy in nats, or mean squared error.
        count: Targets scored.
    """

    quality: float
    loss: float
    count: int


@dataclass(frozen=True)
class Task(ABC):
    """Data to learn from and the yardstick for it.

    A task is a frozen dataclass whose fields are its options: cheap to make, hash and pickle. Data is read on first
    use and kept for the process. Subclasses live one to a file; file stem = registry key = snake_case of the class.

    Class attributes:
        name: Registry key.
        description: One line for people.
        metric: What `quality` means.
        direction: Whether less or more of the metric is better.
        loss_kind: What training minimises.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    metric: ClassVar[Metric]
    direction: ClassVar[Direction]
    loss_kind: ClassVar[LossKind]

    @property
    @abstractmethod
    def signature(self) -> Signature:
        """Inputs and outputs of the models; known without loading data."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """What knowing nothing scores, in the metric."""

    @abstractmethod
    def train_batch(self, rng: np.random.Generator, batch_size: int) -> Batch:
        """Draw training examples, with replacement."""

    @abstractmethod
    def validation_set(self) -> tuple[Array, Array]:
        """Every validation input and its targets, in a fixed order; rows are examples."""

    @abstractmethod
    def quality(self, *, loss: float, accuracy: float) -> float:
        """The metric, from the mean loss and the fraction of targets predicted right."""

    @abstractmethod
    def measure_baselines(self) -> dict[str, float]:
        """Score the trivial models on the validation split; uncached, see `baselines`."""

    @abstractmethod
    def fingerprint_arrays(self) -> Iterable[Array]:
        """The data that a fingerprint covers, both splits."""

    def baselines(self) -> dict[str, float]:
        """Scores of trivial models by name, in the metric, on the same validation targets as any model."""
        return dict(_baselines(self))

    def fingerprint(self) -> str:
        """Hash of the data and the options, the same wherever the data lies; a changed one forbids resuming a study."""
        return _fingerprint(self)

    def validation_batches(self, batch_size: int) -> Iterator[Batch]:
        """The validation split in batches of one size; the last is padded with copies of its first row.

        Args:
            batch_size: Rows of every batch.

        Yields:
            Batches in a fixed order, each example valid exactly once.
        """
        inputs, targets = self.validation_set()
        for start in range(0, len(inputs), batch_size):
            rows = np.arange(start, start + batch_size)
            valid = int(min(batch_size, len(inputs) - start))
            rows[valid:] = start
            yield self.batch(inputs[rows], targets[rows], valid)

    def batch(self, inputs: Array, targets: Array, valid: int | None = None) -> Batch:
        """Name the inputs as the signature does; all rows count unless told."""
        return Batch({self.signature.input_name: inputs}, targets, len(inputs) if valid is None else valid)

    @property
    def options(self) -> dict[str, Any]:
        """Option values by name, without the place of the data."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "data"}


@lru_cache(maxsize=16)
def _baselines(task: Task) -> dict[str, float]:
    return task.measure_baselines()


@lru_cache(maxsize=16)
def _fingerprint(task: Task) -> str:
    digest = hashlib.sha256(json.dumps([task.name, task.options], sort_keys=True).encode())
    for array in task.fingerprint_arrays():
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def evaluate(task: Task, predict: Predict, batch_size: int, *, batches: int | None = None) -> Evaluation:
    """Score a model on the validation split, whatever runs it.

    Args:
        task: The task.
        predict: Takes inputs by name at `batch_size` rows, returns logits or forecast.
        batch_size: Rows of every call.
        batches: Calls at most, from the start of the split; None scores all of it.

    Returns:
        The metric and loss over these validation targets. Both may be non-finite: the caller decides.
    """
    loss = correct = 0.0
    count = 0
    for batch in islice(task.validation_batches(batch_size), batches):
        predicted = np.asarray(predict(batch.inputs))[: batch.valid].astype(np.float64)
        targets = batch.targets[: batch.valid]
        score = _score_classes if task.loss_kind == "cross_entropy" else _score_values
        batch_loss, batch_correct, batch_count = score(predicted, targets)
        loss, correct, count = loss + batch_loss, correct + batch_correct, count + batch_count
    return Evaluation(task.quality(loss=loss / count, accuracy=correct / count), loss / count, count)


def _score_classes(logits: Array, targets: Array) -> tuple[float, float, int]:
    """Summed negative log likelihood, right answers, answers; ignored targets dropped."""
    asked = targets != IGNORED_TARGET
    logits_NV, targets_N = logits[asked], targets[asked]
    shifted_NV = logits_NV - logits_NV.max(axis=-1, keepdims=True)
    picked_N = shifted_NV[np.arange(len(targets_N)), targets_N]
    loss = float((np.log(np.exp(shifted_NV).sum(axis=-1)) - picked_N).sum())
    return loss, float((logits_NV.argmax(axis=-1) == targets_N).sum()), len(targets_N)


def _score_values(forecast: Array, targets: Array) -> tuple[float, float, int]:
    """Summed squared error; no value is ever exactly right."""
    return float(((forecast - targets) ** 2).sum()), 0.0, targets.size


def require_integer(task: str, option: str, value: object, *, least: int, most: int = 1 << 24) -> None:
    """Check an integer option of a task.

    Args:
        task: Registry key, for the message.
        option: Name of the option.
        value: What the user gave.
        least: Smallest value allowed.
        most: Largest value allowed.

    Raises:
        InputError: Not an integer, or out of range.
    """
    if type(value) is not int or not least <= value <= most:
        raise InputError(
            f"bad {option} of task {task}",
            where=f"{task}.{option}",
            expected=f"an integer from {least} to {most}",
            found=repr(value),
        )


def find_data(task: str, data: str, *, folder_allowed: bool) -> Path:
    """The path of a user's data, checked to be readable and of a size that fits in memory.

    Args:
        task: Registry key, for the message.
        data: Path as the user wrote it; `~` is the home folder.
        folder_allowed: Whether a folder of files will do.

    Returns:
        The path.

    Raises:
        DataError: Nothing there, the wrong kind of thing, unreadable, or larger than `MAX_DATA_BYTES`.
    """
    path = Path(data).expanduser()
    expected = "a readable file or folder" if folder_allowed else "a readable file"
    try:
        if not data.strip():
            raise DataError(f"data of task {task} is an empty path", where="data", expected=expected, found=repr(data))
        is_folder, size_bytes = path.is_dir(), path.stat().st_size
        if is_folder and folder_allowed:
            return path
        if is_folder or not path.is_file():
            raise DataError(f"data of task {task} is not a file", where=data, expected=expected, found=_kind(path))
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"data of task {task} cannot be read",
            where=data,
            expected=expected,
            found=reason,
            hint="check the path; it is relative to the current folder",
        ) from error
    if size_bytes > MAX_DATA_BYTES:
        raise DataError(
            f"data of task {task} is too large",
            where=data,
            expected=f"at most {MAX_DATA_BYTES} bytes",
            found=f"{size_bytes} bytes",
            hint="give a part of it",
        )
    return path


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "something that is neither a file nor a folder"
