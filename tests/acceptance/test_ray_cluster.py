"""A search over a Ray cluster of two local nodes loses a worker and a whole node, and nothing else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from nas.executors.ray import Ray
from nas.objectives.custom import Custom
from nas.search import load_study, search
from nas.storages.journal import read_journal
from nas.strategies.nsga2 import NSGA2
from nas.testing.spaces import Grid
from nas.testing.strategies import cost

TRIALS = 40
WAIT_S = 120.0

pytestmark = [pytest.mark.ray_cluster, pytest.mark.timeout(600)]


@pytest.fixture
def cluster():
    """Two nodes of two CPUs each; the driver sits beside the first."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    second = made.add_node(num_cpus=2)
    ray.init(address=made.address, log_to_driver=False)
    made.wait_for_nodes()
    yield made, second
    ray.shutdown()
    made.shutdown()


def quality_of(point):
    """What the logged objective returns."""
    return float(sum(choice**2 for choice in point.choices))


def make_quality(log: str):
    """Return an objective that leaves a line when it starts: its process, its node, its point."""

    def quality(point):
        import ray

        node = ray.get_runtime_context().get_node_id()
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {node} {point.choices}\n")
        time.sleep(0.3)
        return float(sum(choice**2 for choice in point.choices))

    return quality


class Log:
    """What the evaluations wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[tuple[int, str, str]]:
        """Return process, node and point of each evaluation that began."""
        found = self.path.read_text().splitlines() if self.path.exists() else []
        split = [line.split(" ", 2) for line in found]
        return [(int(process), node, point) for process, node, point in split]

    def wait_for(self, node: str | None, after: int = 0) -> int:
        """Wait for an evaluation, on a node where one is given; return its process."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            found = [process for process, where, _ in self.lines()[after:] if node in (None, where)]
            if found:
                return found[-1]
            time.sleep(0.005)
        raise AssertionError("no trial began there")


def finished_points(folder: Path) -> set[str]:
    """Return the points whose trials have finished, as the log writes them."""
    records = read_journal(folder)
    points = {r["trial"]: str(tuple(r["architecture"]["choices"])) for r in records if r["event"] == "trial"}
    return {points[record["trial"]] for record in records if record["event"] == "finished"}


def test_search_survives_the_death_of_a_worker_and_of_a_node(tmp_path, cluster):
    """Their trials run elsewhere; finished ones are neither lost nor run again, and the trials are a serial run's."""
    nodes, second = cluster
    log, folder = Log(tmp_path / "log"), tmp_path / "run"
    strategy = NSGA2(population=10)
    serial = search(Grid((8,) * 6), objectives=[quality_of, cost], strategy=strategy, budget=TRIALS, seed=5)
    kept: list[tuple[set[str], int]] = []

    def trouble() -> None:
        worker = log.wait_for(None, after=4)
        kept.append((finished_points(folder), len(log.lines())))
        if "ray" in " ".join(psutil.Process(worker).cmdline()):
            os.kill(worker, signal.SIGKILL)
        log.wait_for(second.node_id, after=len(log.lines()))
        kept.append((finished_points(folder), len(log.lines())))
        nodes.remove_node(second, allow_graceful=False)

    beside = threading.Thread(target=trouble)
    beside.start()
    executor = Ray(workers=4, retries=5)
    objectives = [Custom(make_quality(str(log.path)), name="quality_of"), cost]
    search(
        Grid((8,) * 6),
        objectives=objectives,
        strategy=strategy,
        budget=TRIALS,
        seed=5,
        storage=folder,
        executor=executor,
    )
    beside.join()

    def sequence(study):
        return [(trial.number, trial.hash, trial.state, trial.values) for trial in study.trials]

    assert sequence(load_study(folder)) == sequence(serial)
    assert len(kept) == 2, "nothing was killed"
    events = Counter((record["event"], record["trial"]) for record in read_journal(folder) if "trial" in record)
    assert set(events.values()) == {1}, "a trial was proposed or finished twice"
    begun = [point for _, _, point in log.lines()]
    assert len(begun) > TRIALS, "no trial was running where the kills fell"
    for finished, length in kept:
        assert not finished & set(begun[length:]), "a trial that had finished was evaluated again"
