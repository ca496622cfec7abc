"""A front that is measured again by the command: what it prints, and what a kill in the middle costs."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter

import pytest

from nas.search import load_study
from nas.storages.journal import read_journal
from tests.acceptance.driving import run_here, run_well, search_arguments, start, write_space


def remeasured(folder):
    return [record for record in read_journal(folder) if record["event"] == "remeasured"]


@pytest.mark.slow
def test_search_measures_latencies_of_its_front_again(tmp_path, capfd):
    """Each point has a second latency; `nas remeasure` looks again at those that are open, and adds to the journal."""
    folder = tmp_path / "run"
    options = ("--objective", "latency", "--objective", "params", "--no-ship", "--json", "--quiet")
    done = run_here(capfd, search_arguments(write_space(tmp_path), folder, *options, trials=5))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["front"]
    for point in result["front"]:
        assert point["remeasured"] == ["latency"]
        assert point["status"] in ("certain", "possible")
        low, high = point["interval"]["latency"]
        assert low <= point["values"]["latency"] <= high
    assert {record["trial"] for record in remeasured(folder)} >= {point["trial"] for point in result["front"]}
    before = (folder / "journal.jsonl").read_bytes()
    again = run_here(capfd, ["remeasure", str(folder), "--seconds", "0.5", "--json", "--quiet"])
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["front"]
    assert (folder / "journal.jsonl").read_bytes().startswith(before)


@pytest.mark.slow
def test_search_killed_while_it_measures_again_repeats_nothing(tmp_path, capfd):
    """Killed between two trainings with other seeds, the same command does the missing ones, with the same results."""
    space, whole, broken = write_space(tmp_path), tmp_path / "whole", tmp_path / "broken"
    options = ("--objective", "quality", "--objective", "params", "--no-ship", "--quiet")
    assert run_here(capfd, search_arguments(space, whole, *options, "--no-remeasure", trials=5)).returncode == 0
    assert not remeasured(whole)
    shutil.copytree(whole, broken)
    arguments = search_arguments(space, broken, *options, "--seeds", "40", trials=5)
    process = start(arguments)
    while process.poll() is None and not remeasured(broken):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = remeasured(broken)
    assert kept
    run_well(arguments)
    assert run_here(capfd, search_arguments(space, whole, *options, "--seeds", "40", trials=5)).returncode == 0
    assert remeasured(broken)[: len(kept)] == kept
    assert len(remeasured(broken)) == len(remeasured(whole)) > len(kept)
    steps = Counter((record["trial"], len(record["details"]["quality"]["seeds"])) for record in remeasured(broken))
    assert set(steps.values()) == {1}, "a training was repeated"
    found = [
        {trial.number: trial.remeasured["quality"] for trial in load_study(run).trials if trial.remeasured}
        for run in (whole, broken)
    ]
    assert found[0] == found[1]
