"""A search killed with SIGKILL, again and again, ends as if it had not been."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from nas.search import load_study
from nas.storages.journal import read_journal
from nas.strategies import base as strategies

TRIALS = 60

# Trials take a few milliseconds, so that kills fall on every part of the loop.
SEARCH = """
import sys, time
from nas.search import search
from nas.strategies import base
from nas.testing.spaces import Grid
from nas.testing.strategies import cost, error

def quality(point):
    time.sleep(0.004)
    return error(point)

options = {
    "nsga2": {"population": 10},
    "regularized_evolution": {"population": 10, "tournament": 3, "batch": 5},
    "predictor_guided": {"batch": 16, "children": 16, "generations": 1},
}
strategy = base.get(sys.argv[2], **options.get(sys.argv[2], {}))
search(Grid((8,) * 6), objectives=[quality, cost], strategy=strategy, budget=int(sys.argv[3]), seed=5,
       storage=sys.argv[1])
"""


def start(folder, strategy):
    return subprocess.Popen([sys.executable, "-c", SEARCH, str(folder), strategy, str(TRIALS)], stderr=subprocess.PIPE)


def run_to_the_end(folder, strategy):
    process = start(folder, strategy)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def journal_bytes(folder):
    path = folder / "journal.jsonl"
    return path.stat().st_size if path.exists() else 0


def kill_on_the_way(folder, strategy, moments, kills):
    """Kill the search a random number of bytes into what it writes next; return how often it was killed in time."""
    killed = 0
    for _ in range(kills):
        goal = journal_bytes(folder) + moments.randrange(1, 2500)
        process = start(folder, strategy)
        while process.poll() is None and journal_bytes(folder) < goal:
            time.sleep(0.0005)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    return killed


def check_killed_search(folder, strategy, kills, seed):
    whole, broken = folder / "whole", folder / "broken"
    run_to_the_end(whole, strategy)
    assert kill_on_the_way(broken, strategy, random.Random(seed), kills) >= kills // 2
    run_to_the_end(broken, strategy)

    def sequence(run):
        return [(trial.number, trial.hash, trial.state, trial.values) for trial in load_study(run).trials]

    assert sequence(broken) == sequence(whole)
    events = Counter((record["event"], record["trial"]) for record in read_journal(broken) if "trial" in record)
    assert set(events.values()) == {1}, "a trial was proposed or finished twice"
    assert sum(event == "finished" for event, _ in events) == TRIALS


@pytest.mark.parametrize("strategy", strategies.REGISTRY.names())
def test_killed_search_ends_with_the_trials_of_an_uninterrupted_one(tmp_path, strategy):
    """Five kills at random moments change neither trials nor values, and repeat nothing that had finished."""
    check_killed_search(tmp_path, strategy, kills=5, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", strategies.REGISTRY.names())
def test_search_killed_twenty_times_ends_with_the_trials_of_an_uninterrupted_one(tmp_path, strategy):
    """As above with twenty kills."""
    check_killed_search(tmp_path, strategy, kills=20, seed=2)
