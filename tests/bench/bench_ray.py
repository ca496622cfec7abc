"""Throughput of Ray workers: trials that only sleep, against what as many workers could do at best.

python tests/bench/bench_ray.py --workers 32 --trials 960 --sleep 1 --json

Sleeping trials need no core, so 32 workers may be had on any machine: Ray is told of as many CPUs. Ideal is one trial
for each worker in the time of the sleep. Starting the worker processes and ending them is reported apart.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from typing import Any

from nas.callbacks import Callback
from nas.executors.ray import Ray
from nas.search import open_study
from nas.testing.spaces import Grid


class Clock(Callback):
    """Note when trials begin and end."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.processes: list[int] = []

    def on_trial(self, study: Any, trial: Any) -> None:
        self.begun.append(time.perf_counter())

    def on_result(self, study: Any, trial: Any) -> None:
        self.ended.append(time.perf_counter())
        self.processes.append(int(trial.values["sleeper"]))


def make_sleeper(seconds: float) -> Any:
    """Return an objective that sleeps, local so that it travels by value."""

    def sleeper(point: Any) -> float:
        time.sleep(seconds)
        return float(os.getpid())

    return sleeper


def measure(workers: int, trials: int, seconds: float, strategy: str) -> dict[str, Any]:
    """Run a study of sleeping trials and return its throughput.

    Args:
        workers: Trials at once.
        trials: Trials in all; those before every worker has answered once are not timed.
        seconds: How long a trial sleeps.
        strategy: What proposes.
    """
    study = open_study(Grid((10,) * 6), objectives=[make_sleeper(seconds)], strategy=strategy)
    clock = Clock()
    start = time.perf_counter()
    study.run(trials, executor=Ray(workers=workers), callbacks=[clock])
    whole = time.perf_counter() - start
    # Worker processes come up one by one: time from where all have answered, to where the last trial is begun.
    seen: set[int] = set()
    first = next(
        place for place, process in enumerate(clock.processes) if not seen.add(process) and len(seen) == workers
    )
    begun, last = clock.ended[first], clock.begun[-1]
    timed = sum(begun < end <= last for end in clock.ended)
    rate = timed / (last - begun)
    return {
        "workers": workers,
        "sleep_s": seconds,
        "start_s": round(begun - start, 2),
        "timed_trials": timed,
        "timed_s": round(last - begun, 2),
        "stop_s": round(start + whole - clock.ended[-1], 2),
        "trials_per_s": round(rate, 2),
        "share_of_ideal": round(rate * seconds / workers, 3),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--trials", type=int, default=960)
    parser.add_argument("--sleep", type=float, default=1.0, help="seconds")
    parser.add_argument("--strategy", default="random")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    import ray

    ray.init(num_cpus=given.workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        found = measure(given.workers, given.trials, given.sleep, given.strategy)
    finally:
        ray.shutdown()
    if given.json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return
    for name, value in found.items():
        print(f"{name:26} {value}")


if __name__ == "__main__":
    main()
