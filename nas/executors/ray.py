"""Trials in worker processes of this machine or a cluster, run by Ray Tune."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from ir.errors import InputError, TargetUnavailable
from nas.executors.base import Evaluate, Executor, JobSource

# Ray reads these once, when it starts: no usage reports, and an interrupt reaches us instead of ending Tune quietly.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Ray(Executor):
    """Let Ray Tune place trials on workers, and run a trial again when its worker dies.

    This process alone writes the journal; outcomes come back through an actor beside it, so that
    workers need no shared disk.

    Attributes:
        workers: Trials at once.
        address: Cluster to join, such as `auto` or `ray://host:10001`; None starts Ray on this machine.
        cpus_per_trial: CPUs that a trial reserves; also the default thread count of its numeric libraries.
        retries: How often a trial whose worker died is run again before it counts as failed.

    Raises:
        InputError: An option is out of range.
    """

    workers: int = 2
    address: str | None = None
    cpus_per_trial: float = 1
    retries: int = 1

    def __post_init__(self) -> None:
        for name, value, least in (("workers", self.workers, 1), ("retries", self.retries, 0)):
            if type(value) is not int or value < least:
                raise InputError(
                    f"bad {name} of the ray executor", expected=f"an integer >= {least}", found=repr(value)
                )
        if not self.cpus_per_trial > 0:
            raise InputError("bad cpus_per_trial", expected="a positive number", found=repr(self.cpus_per_trial))

    def run(self, evaluate: Evaluate, source: JobSource) -> None:
        os.environ.update(_ENVIRONMENT)
        with redirect_stdout(sys.stderr), self._connected():
            from nas.executors._ray_tune import run_trials

            run_trials(evaluate, source, workers=self.workers, cpus_per_trial=self.cpus_per_trial, retries=self.retries)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Start or join Ray for the time of a run, unless the user did."""
        import ray

        if ray.is_initialized():
            yield
            return
        options: dict[str, Any] = {"address": self.address} if self.address else self._local_options()
        try:
            ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
            raise TargetUnavailable(
                "Ray cannot be started or reached",
                where=self.address or "this machine",
                found=str(error).splitlines()[0],
                hint="check --address, or use --executor serial",
            ) from error
        try:
            yield
        finally:
            ray.shutdown()

    def _local_options(self) -> dict[str, Any]:
        cpus = max(os.cpu_count() or 1, -(-self.workers * self.cpus_per_trial // 1))
        # Without an address Ray would join a cluster that somebody else runs on this machine.
        return {"address": "local", "num_cpus": int(cpus), "include_dashboard": False}
