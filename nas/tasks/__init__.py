"""Tasks: data with a yardstick, one file each, found by folder listing (stem = key).

Third parties add tasks through the entry-point group `nas.tasks`; each entry names a `Task` subclass. Listing and
making tasks imports neither torch nor scikit-learn; data is read on first use.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Final

from nas.registry import Registry
from nas.tasks.base import Batch, Evaluation, Metric, Task, evaluate

__all__ = ["Batch", "Evaluation", "Metric", "Task", "evaluate", "get", "names", "option_names"]

_TASKS: Final = Registry("task", "nas.tasks", Task)


def names() -> tuple[str, ...]:
    """Keys of all tasks, sorted."""
    return _TASKS.names()


def option_names(name: str) -> tuple[str, ...]:
    """Options that `get` takes for a task, besides `data`."""
    return tuple(option for option in inspect.signature(_TASKS.get(name)).parameters if option != "data")


def get(name: str, data: str | Path | None = None, **options: object) -> Task:
    """Make a task.

    Args:
        name: Key of the task.
        data: File or folder to use instead of the task's own data; relative to the current folder.
        options: Options of the task by name, such as `seq_len`; the rest keep their defaults.

    Returns:
        The task; its data is not read yet.

    Raises:
        InputError: No such task or option, a bad value, or data for a task that takes none.
        DataError: The data cannot be read.
    """
    return _TASKS.make(name, options if data is None else {**options, "data": str(data)})
