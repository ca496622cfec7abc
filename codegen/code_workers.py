"""The worker processes that generate code for this process, one for each number of threads.

Light to import: a worker can start while this process still imports torch.
"""

from __future__ import annotations

from contextlib import suppress
from threading import Thread
from typing import Final

from codegen.machine import available_cpus, check_threads
from codegen.measure import pinned_worker
from codegen.targets.base import Target
from codegen.workers import Worker
from ir.errors import NasError

_WORKERS: Final[dict[int, Worker]] = {}


def worker_for(threads: int) -> Worker:
    """Return this process's worker that generates code for a number of threads."""
    if threads not in _WORKERS:
        _WORKERS[threads] = pinned_worker(threads, preload=("codegen.build",))
    return _WORKERS[threads]


def start_beside(target: str | Target, threads: int | None = None) -> None:
    """Start the worker for a processor while this process does something else; its first call waits for it.

    Nothing happens where the target's name alone does not tell which worker that is.

    Args:
        target: Target or its name.
        threads: Threads to compile for, where a name is given; all CPUs of the process where None.

    Raises:
        InputError: There are not so many CPUs.
    """
    if isinstance(target, Target):
        if target.gpu is not None:
            return
        count = target.threads
    elif target.partition(":")[0] == "cpu":
        count = len(available_cpus()) if threads is None else check_threads(threads)
    else:
        return
    worker = worker_for(count)

    def start() -> None:
        with suppress(NasError, OSError):  # the first call tries again, and says what is wrong
            worker.start()

    Thread(target=start, daemon=True).start()
