"""Workers that generate code: one a number of threads, started while the process does something else."""

import pytest

from codegen import code_workers, targets
from codegen.workers import Worker
from ir.errors import InputError, KernelCrash


class CountingWorker(Worker):
    """Counts the processes that would be started."""

    starts = 0
    error: Exception | None = None

    def start(self) -> None:
        self.starts += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> dict[int, CountingWorker]:
    """Workers by threads that start no process, and threads that end before `start_beside` does."""
    made = {count: CountingWorker() for count in (1, 2)}
    monkeypatch.setattr(code_workers, "_WORKERS", made)

    class Now:
        def __init__(self, target: object, daemon: bool) -> None:
            assert daemon  # a start that hangs must not keep the process
            self.start = target

    monkeypatch.setattr(code_workers, "Thread", Now)
    return made


def starts(workers: dict[int, CountingWorker]) -> list[int]:
    """How often the workers for one and for two threads were started."""
    return [worker.starts for worker in workers.values()]


def test_start_beside_starts_the_worker_that_the_target_will_use(workers, monkeypatch):
    """A name, with or without threads, and a target lead to the worker that `worker_for` gives."""
    monkeypatch.setattr(code_workers, "available_cpus", lambda: [0, 1])
    code_workers.start_beside("cpu")
    assert starts(workers) == [0, 1]
    code_workers.start_beside("cpu:avx2", 1)
    assert starts(workers) == [1, 1]
    code_workers.start_beside(targets.get("cpu", threads=1))
    assert starts(workers) == [2, 1]
    assert code_workers.worker_for(1) is workers[1]


def test_start_beside_leaves_what_it_cannot_tell(workers):
    """Names of other processors, whose threads only their file knows, and graphics processors start nothing."""
    for target in ("arm64", "cuda", "opencl", "no-such-target"):
        code_workers.start_beside(target)
    code_workers.start_beside(targets.get("metal"))
    assert starts(workers) == [0, 0]


@pytest.mark.parametrize("error", [KernelCrash("it ended"), OSError("no more processes")])
def test_start_beside_leaves_errors_to_the_first_call(workers, error):
    """A worker that cannot start says so where it is asked for something, not in a thread that nobody hears."""
    workers[1].error = error
    code_workers.start_beside("cpu", 1)
    assert starts(workers) == [1, 0]


def test_start_beside_refuses_more_threads_than_cpus(workers):
    """As the target would, before a process is started."""
    with pytest.raises(InputError):
        code_workers.start_beside("cpu", 100_000)
    assert starts(workers) == [0, 0]
