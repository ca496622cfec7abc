"""The command killed with SIGKILL, again and again, ends as if it had not been."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import nas
from nas.search import load_study, open_study
from nas.storages.journal import read_journal
from nas.strategies import base as strategies
from nas.trial import Outcome, decode_quantities
from tests.acceptance.driving import (
    DETERMINISTIC,
    exit_code,
    journal_bytes,
    run_well,
    search_arguments,
    start,
    whole_lines,
    write_space,
)

EVENTS_PER_TRIAL = 30
EVENTS_PER_ARTIFACT = 8
OBJECTIVES = {"latency": nas.Latency, "quality": nas.Quality}
CHEAP = ("--objective", "params", "--objective", "state_bytes")
"""What `exact` takes: a sum over choices that needs no training."""
POPULATION = {"nsga2": ("--population", "4"), "regularized_evolution": ("--population", "4")}


def kill_and_restart(
    arguments: list[str], folder: Path, *, trials: int, artifacts: int, kills: int, seed: int, **environment: str
) -> Counter[str]:
    """Run a search that is killed once in each of equal parts of its life, and at last to its end.

    Args:
        arguments: The command.
        folder: Its run folder.
        trials: How many trials it runs.
        artifacts: How many artifacts it ships, about.
        kills: How often to kill it; every third time in the middle of writing a record.
        seed: Seed of the moments.
        environment: Further variables.

    Returns:
        How often it was killed while `searching` or `shipping`, and how often that left a `torn` record.
    """
    rng = random.Random(seed)
    places: Counter[str] = Counter()
    for kill in range(kills):
        before = whole_lines(journal_bytes(folder))
        done = int((kill + rng.random()) / kills * (trials + artifacts))
        if kill % 3 == 1:
            plan = {"done": done, "events": rng.randint(1, 2), "delay_s": 0.0, "only_writes": True}
        else:
            delay_s = rng.choice((0.0, 10 ** rng.uniform(-3, -0.3)))
            events = rng.randint(1, EVENTS_PER_TRIAL if done < trials else EVENTS_PER_ARTIFACT)
            plan = {"done": done, "events": events, "delay_s": delay_s, "only_writes": False}
        sabotage = {"kill": plan | {"journal": str(folder / "journal.jsonl")}}
        process = start(arguments, sabotage=sabotage, **environment)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        after = journal_bytes(folder)
        assert after.startswith(before), "a record was lost or changed"
        if process.returncode == -signal.SIGKILL:
            has_all = after.count(b'{"event":"finished"') == trials and after.endswith(b"\n")
            places["shipping" if has_all or b'{"event":"artifact"' in after else "searching"] += 1
            places["torn"] += after != whole_lines(after)
    run_well(arguments, **environment)
    return places


def living_processes(token: str) -> list[str]:
    """Return the command lines of processes that inherited a token in their environment."""
    found: list[str] = []
    for process in psutil.process_iter():
        try:
            if token in process.environ().get("NAS_TEST_TOKEN", "") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def check_no_process_is_left(token: str) -> None:
    """Workers end with the process they work for; those of Ray notice within seconds."""
    deadline = time.monotonic() + 60
    while living := living_processes(token):
        assert time.monotonic() < deadline, living
        time.sleep(0.2)


def check_replay(space: Path, folder: Path, objectives: list[str]) -> None:
    """A new study that is told the recorded outcomes in their order proposes the recorded trials."""
    data = str(space.parent / "corpus.txt")
    loaded = replace(nas.load_space(space), data=data)
    study = open_study(
        loaded, objectives=[OBJECTIVES[name]() for name in objectives], strategy=nas.NSGA2(population=4), threads=1
    )
    for record in read_journal(folder):
        if record["event"] == "trial":
            trial = study.ask()
            assert trial is not None
            assert (trial.number, trial.hash, trial.encoded) == (
                record["trial"],
                record["hash"],
                record["architecture"],
            )
        elif record["event"] in ("finished", "failed", "infeasible"):
            study.tell(record["trial"], Outcome(record["event"], decode_quantities(record)))


def sequence(folder: Path) -> list[tuple[int, str, str, dict[str, float]]]:
    return [(trial.number, trial.hash, trial.state, trial.values) for trial in load_study(folder).trials]


def check_nothing_twice(folder: Path, trials: int) -> None:
    """Every trial was proposed and ended once, the front is shipped, and no half-written file is left."""
    events = Counter(
        (record["event"], record["trial"])
        for record in read_journal(folder)
        if record["event"] in ("trial", "finished", "stopped", "failed", "infeasible")
    )
    assert set(events.values()) == {1}, "a trial was proposed or ended twice"
    study = load_study(folder)
    assert len(study.trials) == trials
    for trial in study.trials:  # early stopping ends some, and leaves others where they may go on
        assert trial.state in ("finished", "stopped") or (trial.state == "running" and trial.rungs), trial
    for trial in study.pareto_front():
        assert trial.artifact is not None
        nas.verify(folder / trial.artifact)
    leftovers = [path for path in folder.rglob("*") if path.suffix in (".partial", ".tmp")]
    assert not leftovers


def check_killed_search(folder: Path, strategy: str, *options: str, trials: int, kills: int, seed: int) -> Counter[str]:
    space = write_space(folder)
    options = ("--strategy", strategy, *POPULATION.get(strategy, ()), *options, "--quiet")
    whole, broken = folder / "whole", folder / "broken"
    assert exit_code(search_arguments(space, whole, *options, trials=trials)) == 0
    artifacts = len(load_study(whole).pareto_front())
    arguments = search_arguments(space, broken, *options, trials=trials)
    places = kill_and_restart(arguments, broken, trials=trials, artifacts=artifacts, kills=kills, seed=seed)
    assert sequence(broken) == sequence(whole)
    fronts = [[trial.number for trial in load_study(run).pareto_front()] for run in (whole, broken)]
    assert fronts[0] == fronts[1]
    check_nothing_twice(broken, trials)
    return places


def test_search_killed_three_times_ends_like_an_uninterrupted_one(tmp_path):
    """Same trials, same values, same front, nothing run twice, every artifact sound."""
    places = check_killed_search(tmp_path, "nsga2", "--objective", "quality", trials=8, kills=3, seed=5)
    assert places["searching"] + places["shipping"] == 3
    assert places["torn"] == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", strategies.REGISTRY.names())
def test_search_killed_twenty_times_ends_like_an_uninterrupted_one(tmp_path, strategy):
    """As above with twenty kills, from the first record to the last artifact."""
    objectives = CHEAP if strategy == "exact" else DETERMINISTIC
    places = check_killed_search(tmp_path, strategy, *objectives, trials=14, kills=20, seed=11)
    assert places["searching"] + places["shipping"] >= 18, "a delay may let a run end before it is killed"
    assert places["searching"] >= 8 and places["torn"] >= 3, places
    artifacts = len(load_study(tmp_path / "whole").pareto_front())  # of one, nothing is left to kill after its record
    assert places["shipping"] >= min(2, artifacts // 2), places


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_search_with_measured_latency_proposes_what_replaying_its_journal_does(tmp_path):
    """Latency is noisy, so another run may differ; but nothing is lost or run twice, and the journal decides alone."""
    space, folder = write_space(tmp_path), tmp_path / "run"
    names = ["latency", "quality"]
    options = [part for name in names for part in ("--objective", name)]
    options += ["--strategy", "nsga2", "--population", "4", "--quiet"]
    arguments = search_arguments(space, folder, *options, trials=9)
    places = kill_and_restart(arguments, folder, trials=9, artifacts=2, kills=8, seed=3)
    assert places["searching"] + places["shipping"] >= 6 and places["torn"] >= 1, places
    check_nothing_twice(folder, trials=9)
    check_replay(space, folder, names)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_search_killed_while_ray_runs_it_ends_like_a_serial_one(tmp_path):
    """Workers change neither trials nor values, kills included, and end with the process that was killed."""
    space = write_space(tmp_path)
    options = ("--population", "4", *DETERMINISTIC, "--quiet")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert exit_code(search_arguments(space, whole, *options, trials=10)) == 0
    arguments = search_arguments(space, broken, *options, "--executor", "ray", "--workers", "2", trials=10)
    token = str(tmp_path)
    places = kill_and_restart(arguments, broken, trials=10, artifacts=0, kills=5, seed=4, NAS_TEST_TOKEN=token)
    assert places["searching"] >= 3 and places["torn"] >= 1, places
    assert sequence(broken) == sequence(whole)
    check_nothing_twice(broken, 10)
    check_no_process_is_left(token)
