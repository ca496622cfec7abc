"""A search with Ray workers, its driver and its workers killed with SIGKILL, ends as if nothing had happened.

`pytest -m slow tests/acceptance/test_killed_ray.py --kills 50` kills as often.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from nas.search import load_study
from nas.storages.journal import has_journal, read_journal

TRIALS_PER_KILL = 12  # more than the search does between two kills, so that it does not end too early
WORKERS = 4
WAIT_S = 120.0  # until a search that makes no progress counts as hung

# Every evaluation leaves a line when it starts: its process and its point.
SEARCH = """
import os, sys, time
from nas.executors.ray import Ray
from nas.search import search
from nas.strategies.nsga2 import NSGA2
from nas.testing.spaces import Grid
from nas.testing.strategies import cost

def make_quality(log):
    def quality(point):
        line = f"{os.getpid()} {'-'.join(map(str, point.choices))}\\n".encode()
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line)
        os.close(descriptor)
        time.sleep(0.02 + 0.01 * point.choices[0])
        return float(sum(choice**2 for choice in point.choices))
    return quality

folder, trials, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
executor = Ray(workers=workers, retries=100) if workers else "serial"
search(Grid((8,) * 6), objectives=[make_quality(folder + ".log"), cost], strategy=NSGA2(population=10), budget=trials,
       seed=5, storage=folder, executor=executor)
"""


@dataclass
class Killer:
    """Runs a search again and again, and ends it or a worker of it at random moments.

    Attributes:
        folder: Run folder.
        trials: How many the search runs.
        rng: Decides the moments.
        killed: How often it killed a `driver` and a `worker`.
        finished_then: Points that had finished when a driver was killed, and how long the log was then.
    """

    folder: Path
    trials: int
    rng: random.Random
    killed: Counter[str] = field(default_factory=Counter)
    finished_then: list[tuple[set[str], int]] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """File of the evaluations."""
        return self.folder.with_name(self.folder.name + ".log")

    def run(self, worker_too: bool) -> None:
        """Start the search, kill a worker of it if wanted, and then the search itself somewhere in its next part."""
        goal = size_of(self.folder / "journal.jsonl") + self.rng.randrange(1, 4000)
        process = start(self.folder, self.trials, WORKERS)
        if worker_too:
            self._kill_worker(process)
        wait_until(lambda: process.poll() is not None or size_of(self.folder / "journal.jsonl") >= goal)
        time.sleep(self.rng.choice([0.0, self.rng.uniform(0.0, 0.4)]))
        if process.poll() is None:
            self.killed["driver"] += 1
        process.kill()
        process.communicate()
        self.finished_then.append((finished_points(self.folder), len(self.evaluations())))

    def evaluations(self) -> list[str]:
        """Return the points that were begun, in order."""
        return [line.split()[1] for line in self._lines()]

    def _kill_worker(self, process: subprocess.Popen[bytes]) -> None:
        known = len(self._lines())
        wait_until(lambda: process.poll() is not None or len(self._lines()) > known + 2)
        with contextlib.suppress(ProcessLookupError):
            worker = int(self._lines()[-1].split()[0])
            if process.poll() is None and "ray" in " ".join(psutil.Process(worker).cmdline()):
                os.kill(worker, signal.SIGKILL)
                self.killed["worker"] += 1

    def _lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def start(folder: Path, trials: int, workers: int) -> subprocess.Popen[bytes]:
    """Start the search in a process of its own."""
    arguments = [str(folder), str(trials), str(workers)]
    return subprocess.Popen([sys.executable, "-c", SEARCH, *arguments], stderr=subprocess.PIPE)


def run_to_the_end(folder: Path, trials: int, workers: int) -> None:
    """Run the search until it is done."""
    process = start(folder, trials, workers)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def wait_until(claim) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + WAIT_S
    while not claim():
        assert time.monotonic() < deadline, "the search hangs"
        time.sleep(0.002)


def size_of(path: Path) -> int:
    """Return the bytes of a file, 0 where it is not there yet."""
    return path.stat().st_size if path.exists() else 0


def finished_points(folder: Path) -> set[str]:
    """Return the points whose trials have finished."""
    records = read_journal(folder) if has_journal(folder) else []
    points = {r["trial"]: "-".join(map(str, r["architecture"]["choices"])) for r in records if r["event"] == "trial"}
    return {points[record["trial"]] for record in records if record["event"] == "finished"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_search_with_ray_workers_survives_kills(tmp_path, request):
    """Nothing that finished is lost or evaluated again, and the trials are those of a serial run that nobody killed."""
    kills = request.config.getoption("kills")
    trials = TRIALS_PER_KILL * (kills + 1)
    run_to_the_end(tmp_path / "whole", trials, workers=0)
    killer = Killer(tmp_path / "killed", trials, random.Random(3))
    for number in range(kills):
        killer.run(worker_too=number % 3 == 1)
    run_to_the_end(killer.folder, trials, WORKERS)

    def sequence(run: Path):
        return [(trial.number, trial.hash, trial.state, trial.values) for trial in load_study(run).trials]

    assert sequence(killer.folder) == sequence(tmp_path / "whole")
    events = Counter((record["event"], record["trial"]) for record in read_journal(killer.folder) if "trial" in record)
    assert set(events.values()) == {1}, "a trial was proposed or finished twice"
    begun = killer.evaluations()
    for finished, length in killer.finished_then:
        assert not finished & set(begun[length:]), "a trial that had finished was evaluated again"
    assert killer.killed["driver"] >= kills // 2
    print(f"killed {dict(killer.killed)}, {len(begun)} evaluations of {trials} trials")
