"""The command killed with SIGKILL, again and again, ends as if it had not been."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

import nas
from ir.errors import StorageError
from nas.search import load_study, open_study
from nas.storages.journal import read_journal
from nas.strategies import base as strategies
from nas.trial import Outcome, decode_quantities
from tests.acceptance.driving import (
    DETERMINISTIC,
    journal_bytes,
    run_well,
    search_arguments,
    start,
    whole_lines,
    write_space,
)

EVENTS_PER_TRIAL = 24
POPULATION = {"random": (), "nsga2": ("--population", "4"), "regularized_evolution": ("--population", "4")}


def kill_and_restart(arguments: list[str], folder: Path, *, kills: int, records: int, seed: int) -> int:
    """Run a search that is killed at moments spread over its life, and at last to its end.

    Args:
        arguments: The command.
        folder: Its run folder.
        kills: How often to kill it.
        records: How many records its journal has when it is done.
        seed: Seed of the moments.

    Returns:
        How often it was killed before its end.
    """
    rng = random.Random(seed)
    killed = 0
    for moment in sorted(rng.uniform(0, records) for _ in range(kills)):
        before = whole_lines(journal_bytes(folder))
        delay_s = rng.choice((0.0, 10 ** rng.uniform(-3, -0.3)))
        plan = {"records": int(moment), "events": rng.randint(1, EVENTS_PER_TRIAL), "delay_s": delay_s}
        process = start(arguments, sabotage={"kill": plan | {"journal": str(folder / "journal.jsonl")}})
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        assert journal_bytes(folder).startswith(before), "a record was lost or changed"
        killed += process.returncode == -signal.SIGKILL
    run_well(arguments)
    return killed


def sequence(folder: Path) -> list[tuple[int, str, str, dict[str, float]]]:
    return [(trial.number, trial.hash, trial.state, trial.values) for trial in load_study(folder).trials]


def check_nothing_twice(folder: Path, trials: int) -> None:
    """Every trial was proposed and ended once, the front is shipped, and no half-written file is left."""
    events = Counter(
        (record["event"], record["trial"])
        for record in read_journal(folder)
        if record["event"] in ("trial", "finished", "failed", "infeasible")
    )
    assert set(events.values()) == {1}, "a trial was proposed or ended twice"
    assert sum(event == "finished" for event, _ in events) == trials
    study = load_study(folder)
    for trial in study.pareto_front():
        assert trial.artifact is not None
        nas.verify(folder / trial.artifact)
    leftovers = [path for path in folder.rglob("*") if path.suffix in (".partial", ".tmp")]
    assert not leftovers


def check_killed_search(folder: Path, strategy: str, *options: str, trials: int, kills: int, seed: int) -> int:
    space = write_space(folder)
    options = ("--strategy", strategy, *POPULATION[strategy], *options, "--quiet")
    whole, broken = folder / "whole", folder / "broken"
    run_well(search_arguments(space, whole, *options, trials=trials))
    records = len(read_journal(whole))
    killed = kill_and_restart(
        search_arguments(space, broken, *options, trials=trials), broken, kills=kills, records=records, seed=seed
    )
    assert sequence(broken) == sequence(whole)
    fronts = [[trial.number for trial in load_study(run).pareto_front()] for run in (whole, broken)]
    assert fronts[0] == fronts[1]
    check_nothing_twice(broken, trials)
    return killed


def test_search_killed_three_times_ends_like_an_uninterrupted_one(tmp_path):
    """Same trials, same values, same front, nothing run twice, every artifact sound."""
    assert check_killed_search(tmp_path, "nsga2", "--objective", "quality", trials=8, kills=3, seed=5) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", strategies.REGISTRY.names())
def test_search_killed_twenty_times_ends_like_an_uninterrupted_one(tmp_path, strategy):
    """As above with twenty kills, from the first record to the last artifact."""
    assert check_killed_search(tmp_path, strategy, *DETERMINISTIC, trials=14, kills=20, seed=11) >= 16
