"""The part of the Ray executor that needs Ray loaded: Ray Tune keeps the workers, a mailbox hands them jobs."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import uuid
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ir.errors import NasError, TargetUnavailable
from nas.executors.base import Evaluate, Job, JobSource
from nas.trial import Outcome

_WAIT_S: Final = 1.0  # between looks at whether Tune still keeps the workers
_STOP_S: Final = 30.0  # for Tune to end its workers
_IDLE_RESTARTS: Final = 8  # more deaths than trials can be the reason for

Ended: TypeAlias = "tuple[int, Outcome | NasError | None]"


@ray.remote(num_cpus=0)
class _Mailbox:
    """Jobs out, outcomes back. Tune takes tenths of a second for each of its trials, this takes a millisecond.

    A job whose worker died before it answered is handed out again.
    """

    def __init__(self, retries: int) -> None:
        self._retries = retries
        self._jobs: deque[tuple[Job, int]] = deque()  # with how often a worker died of it
        self._held: dict[int, tuple[Job, int]] = {}
        self._lives: Counter[int] = Counter()
        self._ended: deque[Ended] = deque()
        self._changed = asyncio.Condition()

    async def put_jobs(self, jobs: list[Job]) -> None:
        async with self._changed:
            self._jobs.extend((job, 0) for job in jobs)
            self._changed.notify_all()

    async def lose(self, worker: int) -> None:
        """Take back the job of a worker process that has died: hand it out again, or call it ended."""
        async with self._changed:
            self._lives[worker] += 1
            if worker in self._held:
                job, deaths = self._held.pop(worker)
                if deaths < self._retries:
                    self._jobs.appendleft((job, deaths + 1))
                else:
                    self._ended.append((job.number, None))
            self._changed.notify_all()

    async def take_job(self, worker: int, answer: tuple[int, Outcome | NasError] | None = None) -> Job | None:
        """Take what came of a worker's last job, and wait for the next; None for a worker that counts as dead."""
        async with self._changed:
            if answer is not None and worker in self._held and self._held[worker][0].number == answer[0]:
                del self._held[worker]
                self._ended.append(answer)
                self._changed.notify_all()
            life = self._lives[worker]
            await self._changed.wait_for(lambda: self._jobs or self._lives[worker] != life)
            if self._lives[worker] != life:
                return None
            self._held[worker] = self._jobs.popleft()
            return self._held[worker][0]

    async def take_outcomes(self, seconds: float) -> list[Ended]:
        """Return what has ended, after waiting for something to."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._ended), seconds)
            except TimeoutError:
                return []
            ended = list(self._ended)
            self._ended.clear()
            return ended


def run_trials(evaluate: Evaluate, source: JobSource, *, workers: int, cpus_per_trial: float, retries: int) -> None:
    """Run jobs on workers that Ray Tune places and replaces, until the source has none.

    Args:
        evaluate: Evaluates one job, in a worker process.
        source: Where jobs come from and results go, in this process.
        workers: Trials at once.
        cpus_per_trial: CPUs that a trial reserves.
        retries: How often a trial whose worker died is run again.

    Raises:
        NasError: What ends the whole study.
    """
    driver = ray.get_runtime_context().get_node_id()
    beside_driver = NodeAffinitySchedulingStrategy(driver, soft=False)
    mailbox: Any = _Mailbox.options(scheduling_strategy=beside_driver).remote(retries)
    died = Outcome("failed", reason=_describe_death(retries))
    running: set[int] = set()
    worker = tune.with_resources(_make_worker(evaluate, mailbox), {"cpu": cpus_per_trial})
    pool = _Pool(worker, workers, mailbox)
    most_restarts = (retries + 1) * workers + _IDLE_RESTARTS
    try:
        while True:
            jobs: list[Job] = []
            while len(running) < workers and (job := source.next_job()) is not None:
                running.add(job.number)
                jobs.append(job)
            if not running:
                return
            pool.start()
            mailbox.put_jobs.remote(jobs)
            ended: list[Ended] = ray.get(mailbox.take_outcomes.remote(_WAIT_S))
            for number, outcome in ended:
                if isinstance(outcome, NasError):
                    raise outcome
                running.discard(number)
                source.end_job(number, outcome or died)
            pool.check(bool(ended), most_restarts)
    finally:
        pool.stop()


class _Watch(tune.Callback):
    """Hears from Tune of workers that died; they may have to wait for room before they are started anew."""

    def __init__(self, mailbox: Any, key: str) -> None:
        self._mailbox = mailbox
        self._key = key

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker died and will be started anew."""
        _restarts[self._key] += 1
        ray.get(self._mailbox.lose.remote(trial.config["worker"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker died for good."""
        ray.get(self._mailbox.lose.remote(trial.config["worker"]))


# By study: Tune copies what it is given, but stays in this process.
_stopped: set[str] = set()
_restarts: Counter[str] = Counter()


class _Stopper(tune.Stopper):
    """Tells Tune, which copies it, that a study has ended."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Leave single workers alone."""
        return False

    def stop_all(self) -> bool:
        """True once the study has ended."""
        return self.key in _stopped


class _Pool:
    """Workers as trials of Ray Tune, which runs in a thread of its own and starts one anew that died."""

    def __init__(self, worker: Any, count: int, mailbox: Any) -> None:
        self._worker = worker
        self._count = count
        self._stopper = _Stopper(uuid.uuid4().hex)
        self._watch = _Watch(mailbox, self._stopper.key)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._keep, name="ray-tune", daemon=True)

    def start(self) -> None:
        """Start the workers, unless they are."""
        if self._thread.ident is None:
            self._thread.start()

    def check(self, has_news: bool, most_restarts: int) -> None:
        """Raise where no worker is left.

        Args:
            has_news: Whether a trial has ended since the last look.
            most_restarts: Deaths of workers without a trial that ends before they count as unable to work.

        Raises:
            TargetUnavailable: Tune has ended, or workers do nothing but die.
        """
        if has_news:
            _restarts[self._stopper.key] = 0
        if not self._thread.is_alive() or _restarts[self._stopper.key] > most_restarts:
            raise TargetUnavailable(
                "Ray keeps no workers for the trials that are left",
                expected=f"{self._count} workers",
                found=f"{type(self._error).__name__}: {self._error}" if self._error else "workers that die at once",
                hint="give the same command again: the trials that were running are run again",
            ) from self._error

    def stop(self) -> None:
        """End the workers, whatever they do, and wait until Tune has."""
        _stopped.add(self._stopper.key)
        if self._thread.ident is not None:
            self._thread.join(_STOP_S)
        del _restarts[self._stopper.key]

    def _keep(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="nas-ray-") as folder:
                tune.Tuner(
                    self._worker,
                    param_space={"worker": tune.grid_search(list(range(self._count)))},
                    run_config=tune.RunConfig(
                        name="study",
                        storage_path=folder,
                        verbose=0,
                        failure_config=tune.FailureConfig(max_failures=-1),
                        callbacks=[self._watch],
                        stop=self._stopper,
                    ),
                ).fit()
        except BaseException as error:  # noqa: BLE001 - told by `check`
            self._error = error


def _make_worker(evaluate: Evaluate, mailbox: Any) -> Callable[[dict[str, Any]], None]:
    def work(config: dict[str, Any]) -> None:
        worker = config["worker"]
        ray.get(mailbox.lose.remote(worker))
        answer: tuple[int, Outcome | NasError] | None = None
        while True:
            job: Any = ray.get(mailbox.take_job.remote(worker, answer))
            if job is None:
                return
            try:
                answer = job.number, evaluate(job)
            except NasError as error:  # ends the study, which is for the driver to do
                answer = job.number, error

    return work


def _describe_death(retries: int) -> str:
    times = f"{retries + 1} times" if retries else "once"
    return f"WorkerDied: the process that ran this trial ended without a result, {times}"
