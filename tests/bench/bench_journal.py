"""How many trials a journal takes each second, and how fast a large study opens: python tests/bench/bench_journal.py

Trials carry real architectures of `tiny_lm`, three values with an interval, and are asked and told as that many workers
would; no trial takes any time. Then a study of many such trials is opened, in a process of its own. The time that the
disk takes for one sync is printed beside them, because it alone bounds what one worker can do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from nas.evaluate import Evaluator
from nas.goals import Goals
from nas.objectives.custom import Custom
from nas.proposals import hash_encoded
from nas.storages.journal import Journal
from nas.storages.records import encode
from nas.study import Study
from nas.trial import Outcome, Quantity
from searchspaces.space import load_space

SPACE = "tiny_lm"
OPEN = """
import resource, sys, time
sys.path.insert(0, sys.argv[2])
from bench_journal import open_study
started = time.perf_counter()
study = open_study(sys.argv[1])
seconds = time.perf_counter() - started
assert study.num_trials == int(sys.argv[3]), study.num_trials
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def open_study(folder: str | Path) -> Study:
    """Open a study of three objectives over the space, without a task."""
    goals = Goals.of([Custom(len, name=name) for name in ("params", "latency", "quality")])
    return Study(load_space(SPACE), Evaluator(goals), hash_of=hash_encoded, storage=Journal(folder))


def make_outcome(rng: np.random.Generator) -> Outcome:
    """Return three made-up values."""
    latency = float(np.exp(rng.normal()))
    return Outcome(
        "finished",
        {
            "params": Quantity(float(rng.integers(1_000_000)), "", "counted"),
            "latency": Quantity(latency, "ms", "measured", (0.98 * latency, 1.03 * latency), {"threads": 2}),
            "quality": Quantity(float(rng.normal()), "nats", "trained"),
        },
        seconds=1.0,
    )


def time_trials(folder: Path, trials: int, workers: int) -> dict[str, float]:
    """Ask and tell, and return trials each second: all of it, and without the time that drawing a proposal takes."""
    rng = np.random.default_rng(0)
    with open_study(folder) as study:
        proposing = _count_time(study._proposer, "propose")
        started = time.perf_counter()
        for _ in range(trials // workers):
            asked = [study.ask() for _ in range(workers)]
            for trial in asked:
                assert trial is not None
                study.tell(trial.number, make_outcome(rng))
        study.storage.sync()
        seconds = time.perf_counter() - started
    done = trials // workers * workers
    return {"trials_per_s": done / seconds, "trials_per_s_without_proposing": done / (seconds - proposing[0])}


def write_trials(folder: Path, trials: int) -> int:
    """Grow the journal of a study to that many ended trials by records like its own; return its bytes."""
    path = folder / "journal.jsonl"
    header, *rest = path.read_bytes().splitlines(keepends=True)
    own = [json.loads(line) for line in rest]
    proposed, ended = ([r for r in own if r["event"] == event] for event in ("trial", "finished"))
    with path.open("wb") as file:
        file.write(header)
        for number in range(trials):
            kind = number % len(proposed)
            same = {"trial": number, "hash": f"{number:064x}"}
            file.write(encode(proposed[kind] | same))
            file.write(encode(ended[kind] | same))
    return path.stat().st_size


def time_sync(folder: Path, repeats: int = 50) -> float:
    """Return the median milliseconds of an fsync after 1.5 kB."""
    descriptor = os.open(folder / "sync", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    times: list[float] = []
    for _ in range(repeats):
        os.write(descriptor, b"x" * 1500)
        started = time.perf_counter()
        os.fsync(descriptor)
        times.append(time.perf_counter() - started)
    os.close(descriptor)
    return float(np.median(times)) * 1e3


def measure(trials: int, workers: int, opened: int) -> dict[str, Any]:
    """Return everything that is printed."""
    with tempfile.TemporaryDirectory(prefix="nas-bench-") as name:
        folder = Path(name)
        rates = time_trials(folder / "run", trials, workers)
        alone = time_trials(folder / "alone", trials // 10, 1)
        size = write_trials(folder / "run", opened)
        command = [sys.executable, "-c", OPEN, str(folder / "run"), str(Path(__file__).parent), str(opened)]
        times = [list(map(float, subprocess.check_output(command).split())) for _ in range(3)]
        return {
            "workers": workers,
            **rates,
            "trials_per_s_one_worker": alone["trials_per_s"],
            "sync_ms": time_sync(folder),
            "opened_trials": opened,
            "opened_bytes": size,
            "open_s": [round(seconds, 3) for seconds, _ in times],
            "open_peak_bytes": int(max(peak for _, peak in times)),
        }


def _count_time(owner: Any, name: str) -> list[float]:
    """Add up the seconds spent in a method."""
    method, spent = getattr(owner, name), [0.0]

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            spent[0] += time.perf_counter() - started

    setattr(owner, name, timed)
    return spent


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--open", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.trials, options.workers, options.open)
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"{found['trials_per_s']:.0f} trials/s with {found['workers']} workers "
        f"({found['trials_per_s_without_proposing']:.0f} without the time of proposing), "
        f"{found['trials_per_s_one_worker']:.0f} with one; a sync takes {found['sync_ms']:.2f} ms"
    )
    print(
        f"{found['opened_trials']} trials ({found['opened_bytes'] / 1e6:.0f} MB) open in {min(found['open_s']):.2f} to "
        f"{max(found['open_s']):.2f} s, using {found['open_peak_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
