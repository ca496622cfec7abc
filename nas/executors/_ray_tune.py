"""The part of the Ray executor that needs Ray loaded: a searcher that feeds our proposals to Ray Tune."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ir.errors import NasError
from nas.executors.base import Evaluate, Job, JobSource
from nas.trial import Outcome


@ray.remote(num_cpus=0)
class _Mailbox:
    """Jobs out, outcomes back. Tune would print and log them, and copy them into its own state."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._outcomes: dict[int, Outcome | NasError] = {}

    def put_job(self, job: Job) -> None:
        self._jobs[job.number] = job

    def get_job(self, number: int) -> Job:
        return self._jobs[number]

    def put_outcome(self, number: int, outcome: Outcome | NasError) -> None:
        self._outcomes[number] = outcome

    def take_outcome(self, number: int) -> Outcome | NasError | None:
        self._jobs.pop(number, None)
        return self._outcomes.pop(number, None)


def run_trials(evaluate: Evaluate, source: JobSource, *, workers: int, cpus_per_trial: float, retries: int) -> None:
    """Run jobs with Ray Tune until the source has none.

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
    mailbox: Any = _Mailbox.options(scheduling_strategy=beside_driver).remote()
    searcher = _Proposals(source, mailbox, workers, retries)
    trainable = tune.with_resources(_make_trainable(evaluate, mailbox), {"cpu": cpus_per_trial})
    with tempfile.TemporaryDirectory(prefix="nas-ray-") as folder:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="study",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=retries),
            ),
        ).fit()
    if searcher.error is not None:
        raise searcher.error


def _make_trainable(evaluate: Evaluate, mailbox: Any) -> Callable[[dict[str, Any]], None]:
    def run_trial(config: dict[str, Any]) -> None:
        number = config["number"]
        job: Any = ray.get(mailbox.get_job.remote(number))
        try:
            outcome: Outcome | NasError = evaluate(job)
        except NasError as error:  # ends the study, which is for the driver to do
            outcome = error
        ray.get(mailbox.put_outcome.remote(number, outcome))
        tune.report({"number": number})

    return run_trial


class _Proposals(Searcher):
    """Hand our jobs to Tune as it has room for them, and outcomes to the source."""

    def __init__(self, source: JobSource, mailbox: Any, workers: int, retries: int) -> None:
        super().__init__(metric="number", mode="min")
        self.error: BaseException | None = None
        self._source = source
        self._mailbox = mailbox
        self._workers = workers
        self._retries = retries
        self._numbers: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles searchers for its own snapshots, which are never read; the journal is the truth."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        if self.error is not None:
            return Searcher.FINISHED
        if len(self._numbers) >= self._workers:
            return None
        try:
            job = self._source.next_job()
        except BaseException as error:  # noqa: BLE001 - Tune would swallow it: kept, and raised once Tune has stopped
            self.error = error
            return Searcher.FINISHED
        if job is None:
            return None if self._numbers else Searcher.FINISHED
        ray.get(self._mailbox.put_job.remote(job))
        self._numbers[trial_id] = job.number
        return {"number": job.number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is None or self.error is not None:
            return
        try:
            outcome: Any = ray.get(self._mailbox.take_outcome.remote(number))
            if isinstance(outcome, NasError):
                raise outcome
            self._source.end_job(number, outcome or self._died())
        except BaseException as raised:  # noqa: BLE001 - as in `suggest`
            self.error = raised

    def _died(self) -> Outcome:
        times = f"{self._retries + 1} times" if self._retries else "once"
        return Outcome("failed", reason=f"WorkerDied: the process that ran this trial ended without a result, {times}")

    def save(self, checkpoint_path: str) -> None:
        """Tune would save us to resume by; our journal does that."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""
