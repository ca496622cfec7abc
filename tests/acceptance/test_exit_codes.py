"""Exit codes of the command line, what it leaves behind when it refuses, and JSON alone on stdout."""

from __future__ import annotations

import json

import pytest

from codegen.artifact import read
from tests.acceptance.driving import SPACE, files_below, run, run_here, run_well, search_arguments, write_space


def test_latency_of_a_target_that_is_not_here_is_refused_with_the_ways_out(tmp_path, capfd):
    """Exit code 3 before anything is trained or written."""
    space = write_space(tmp_path)
    before = files_below(tmp_path)
    arguments = search_arguments(
        space, tmp_path / "run", "--target", "arm64", "--json", "--objective", "latency", trials=1
    )
    done = run_here(capfd, arguments)
    assert done.returncode == 3, done.stderr
    assert "latency on 'arm64' cannot be measured" in done.stderr
    assert "--device" in done.stderr and "hint: " in done.stderr
    assert done.stdout == ""
    assert files_below(tmp_path) == before


def test_search_without_latency_ships_for_a_target_that_is_not_here(tmp_path, capfd):
    """Nothing has to be measured, so the front is compiled for the device and said to be unmeasured."""
    arguments = search_arguments(
        write_space(tmp_path), tmp_path / "run", "--target", "metal", "--json", "--objective", "params", trials=1
    )
    done = run_here(capfd, arguments)
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "run" / "artifacts").glob("*.nas")
    shipped = read(path)
    assert (shipped.target["name"], shipped.latency) == ("metal", None)
    assert shipped.unverified


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("depth:", "deepth:"), 9),
        (("{range: [1, 2, 1]}", "{range: [2, 1, 1]}"), 9),
        (("rms_norm, layer_norm", "rms_nrom, layer_norm"), 10),
        (("[16, 24, 32, 40]", "[]"), 8),
        (("num_heads: {choice: [2, 4]}", "num_heads: {choice: [7]}"), 18),
    ],
)
def test_malformed_space_is_refused_and_nothing_is_written(tmp_path, capfd, change, line):
    """Exit code 2 with file and line, expected and found; there is no run folder afterwards."""
    assert change[0] in SPACE
    space = write_space(tmp_path, SPACE.replace(*change))
    before = files_below(tmp_path)
    done = run_here(capfd, search_arguments(space, tmp_path / "run", "--json", trials=1))
    assert done.returncode == 2
    assert f"{space}:{line}" in done.stderr
    assert "expected: " in done.stderr and "found: " in done.stderr
    assert done.stdout == ""
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--strategy", "nsga3"), "did you mean 'nsga2'"),
        (("--objective", "qualty"), "did you mean 'quality'"),
        (("--constraint", "params=3"), "NAME<=NUMBER"),
        (("--executor", "rey"), "did you mean 'ray'"),
        (("--workers", "2"), "add --executor ray"),
        (("--threads", "1000"), "number of threads"),
        (("--data", "missing.txt"), "missing.txt"),
        (("--trials", "0"), "--trials"),
        (("--steps", "3", "--tokens", "64"), "tokens"),
        (("--target", "gpu"), "unknown target"),
    ],
)
def test_bad_option_is_refused_and_nothing_is_written(tmp_path, capfd, options, part):
    """Exit code 2 and a message that says what would have been right."""
    space = write_space(tmp_path)
    before = files_below(tmp_path)
    done = run_here(capfd, [*search_arguments(space, tmp_path / "run", trials=1), *options])
    assert done.returncode == 2, done.stderr
    assert part in done.stderr
    assert files_below(tmp_path) == before


def test_space_and_run_that_do_not_exist_are_told_apart(tmp_path, capfd):
    """A missing space is bad input; so is a report on a folder that holds no study, told without a traceback."""
    done = run_here(capfd, ["search", str(tmp_path / "missing.yaml"), "--out", str(tmp_path / "run")])
    assert done.returncode == 2
    assert "missing.yaml" in done.stderr
    done = run_here(capfd, ["report", str(tmp_path)])
    assert done.returncode == 2
    assert "this folder holds no" in done.stderr
    assert not list(tmp_path.iterdir())


def test_json_of_a_search_is_alone_on_stdout_and_complete(tmp_path, capfd):
    """One JSON object with the fields that scripts rely on; progress and tables are on stderr."""
    space = write_space(tmp_path)
    folder = tmp_path / "run"
    arguments = search_arguments(space, folder, "--objective", "quality", "--json", trials=2)
    done = run_here(capfd, arguments)
    result = json.loads(done.stdout)
    assert set(result) == {"run", "front", "certain", "possible", "unsettled", "trials"}
    assert result["run"] == str(folder)
    assert result["trials"] == {"finished": 2, "failed": 0, "infeasible": 0}
    [point] = result["front"]
    keys = {"trial", "values", "units", "source", "interval", "remeasured", "hash", "artifact", "status"}
    assert set(point) == keys
    assert point["units"]["quality"] == "bits/byte" and point["source"]["quality"] == "trained"
    assert json.loads((folder / "journal.jsonl").read_text().splitlines()[0])["event"] == "study"
    assert "Pareto front" in done.stderr
    assert json.loads(run_here(capfd, arguments).stdout) == result


@pytest.mark.slow
def test_json_of_every_verb_is_alone_on_stdout(tmp_path):
    """Each verb that prints data prints one JSON document and nothing else, libraries and workers included."""
    space = write_space(tmp_path)
    folder, artifact = tmp_path / "run", tmp_path / "model.nas"
    json.loads(
        run_well(
            search_arguments(
                space, folder, "--objective", "quality", "--executor", "ray", "--workers", "2", "--json", trials=2
            )
        ).stdout
    )
    kinds = ("components", "zoo", "targets", "tasks", "strategies", "objectives", "executors")
    for arguments in [
        *(["list", kind] for kind in kinds),
        ["show", str(space)],
        ["show", str(folder)],
        ["compile", str(folder), "-o", str(artifact)],
        ["verify", str(artifact)],
        ["bench", str(artifact), "--against", "eager"],
        ["report", str(folder)],
    ]:
        json.loads(run_well([*arguments, "--json"]).stdout)
    done = run(["doctor", "--json"])
    json.loads(done.stdout)
