"""A full disk, a folder that cannot be written, two searches at once, Ctrl-C: a clear message, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from nas.search import load_study
from nas.storages.journal import read_journal
from tests.acceptance.driving import (
    DETERMINISTIC,
    exit_code,
    files_below,
    journal_bytes,
    run_here,
    run_well,
    search_arguments,
    start,
    whole_lines,
    write_space,
)

TRIALS = 3
PLENTY = "64m"


class Disk:
    """A file system of its own, whose size can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.path], check=True)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={PLENTY}", "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system of limited size")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    space = write_space(folder)
    assert exit_code(search_arguments(space, folder / "run", *DETERMINISTIC, trials=TRIALS)) == 0
    return folder / "run"


def sequence(folder):
    return [(trial.number, trial.hash, trial.state, trial.values) for trial in load_study(folder).trials]


def used_bytes(folder, *names):
    return sum(path.stat().st_size for name in names for path in (folder / name).rglob("*") if path.is_file())


# Pages of 4096 bytes: the lock takes one, the first record another; weights and artifacts take tens each.
@pytest.mark.parametrize("when", ["at_the_start", "in_training", "in_shipping"])
def test_full_disk_stops_the_search_and_loses_nothing(tmp_path, disk, whole, capfd, when):
    """Exit code 1 and a message with the way out; the journal stays readable, and with room the search goes on."""
    sizes = {
        "at_the_start": "4k",
        "in_training": str(used_bytes(whole, "trials") // 2),
        "in_shipping": str(used_bytes(whole, "trials") + used_bytes(whole, "artifacts") // 2),
    }
    disk.resize(sizes[when])
    run = disk.path / "run"
    arguments = search_arguments(write_space(tmp_path), run, *DETERMINISTIC, trials=TRIALS)
    done = run_here(capfd, arguments)
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert "hint: " in done.stderr
    before = journal_bytes(run)
    assert before == whole_lines(before), "a half-written record stays"
    if when == "in_shipping":
        assert len(load_study(run).pareto_front()) == len(load_study(whole).pareto_front())
    elif before:
        read_journal(run)
    disk.resize(PLENTY)
    assert run_here(capfd, arguments).returncode == 0
    assert journal_bytes(run).startswith(before)
    assert sequence(run) == sequence(whole)
    assert all(trial.artifact is not None for trial in load_study(run).pareto_front())


@pytest.mark.slow
def test_full_folder_for_temporary_files_fails_no_trial(tmp_path, disk):
    """What the compiler cannot write is no fault of a candidate: the search stops, and runs the trial again later."""
    disk.resize("16k")
    run = tmp_path / "run"
    arguments = search_arguments(write_space(tmp_path), run, "--objective", "latency", trials=2)
    process = start(arguments, TMPDIR=str(disk.path))
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "no room" in errors and "TMPDIR" in errors
    assert {trial.state for trial in load_study(run).trials} <= {"running"}
    disk.resize(PLENTY)
    run_well(arguments, TMPDIR=str(disk.path))
    assert {trial.state for trial in load_study(run).trials} == {"finished"}


@pytest.mark.parametrize("place", ["file/run", "/proc/nas/run", "file"])
def test_run_folder_that_cannot_be_made_is_a_clear_error(tmp_path, capfd, place):
    """The path is named with the system's reason, exit code 1, and nothing is written."""
    space = write_space(tmp_path)
    (tmp_path / "file").write_text("a file")
    out = tmp_path / place
    before = files_below(tmp_path)
    done = run_here(capfd, search_arguments(space, out, *DETERMINISTIC, trials=1))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {out}")
    assert "expected: " in done.stderr and "found: " in done.stderr and "hint: " in done.stderr
    assert files_below(tmp_path) == before


def test_read_only_run_folder_is_a_clear_error(tmp_path, disk, capfd):
    """A read-only file system is named as such; the study in it stays as it is, and can still be read."""
    run = disk.path / "run"
    arguments = search_arguments(write_space(tmp_path), run, "--objective", "params", "--no-ship", trials=1)
    assert run_here(capfd, arguments).returncode == 0
    before = journal_bytes(run)
    subprocess.run(["mount", "-o", "remount,ro", disk.path], check=True)
    arguments[arguments.index("--trials") + 1] = "2"
    done = run_here(capfd, arguments)
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr and str(run) in done.stderr and "hint: " in done.stderr
    assert journal_bytes(run) == before
    assert len(load_study(run).trials) == 1


def test_second_search_in_one_folder_is_refused(tmp_path, capfd):
    """While one search holds the folder another ends at once, names the holder, and disturbs nothing."""
    run = tmp_path / "run"
    arguments = search_arguments(write_space(tmp_path), run, "--objective", "quality", "--steps", "100000", trials=1)
    with start(arguments) as first:
        try:
            assert first.stderr is not None
            while "training" not in first.stderr.readline():
                assert first.poll() is None
            before = journal_bytes(run)
            second = run_here(capfd, arguments)
            assert second.returncode == 1
            assert "another study is running in this folder" in second.stderr
            assert f"held by process {first.pid}" in second.stderr
            assert journal_bytes(run) == before
            assert first.poll() is None, "the first search goes on"
        finally:
            first.kill()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("seed", ["--seed", "1"]),
        ("strategy", ["--strategy", "random"]),
        ("objectives", ["--steps", "6"]),
        ("objectives", ["--objective", "flops"]),
        ("constraints", ["--constraint", "params<=1e6"]),
        ("space", ["--space"]),
        ("task", ["--data", "other.txt"]),
        ("target", ["--threads", "2"]),
    ],
)
def test_resuming_with_a_changed_setting_is_refused_by_name(tmp_path, capfd, name, changed):
    """The error names the setting with both values and the way out, with exit code 2; the study is left alone."""
    space, run = write_space(tmp_path), tmp_path / "run"
    options = ("--objective", "params", "--objective", "quality", "--steps", "1", "--no-ship")
    arguments = search_arguments(space, run, *options, trials=1)
    assert run_here(capfd, arguments).returncode == 0
    before = journal_bytes(run)
    if changed == ["--space"]:
        space.write_text(space.read_text().replace("[16, 24, 32, 40]", "[16, 24, 32]"))
        changed = []
    (tmp_path / "other.txt").write_text("another text " * 400)
    changed = [str(tmp_path / part) if part == "other.txt" else part for part in changed]
    done = run_here(capfd, [*arguments, *changed])
    assert done.returncode == 2
    assert f"this folder holds a study with another {name}" in done.stderr
    assert f"expected: {name}" in done.stderr and f"found: {name}" in done.stderr
    assert "another folder" in done.stderr
    assert journal_bytes(run) == before
    assert run_here(capfd, search_arguments(write_space(tmp_path), run, *options, trials=1)).returncode == 0


def interrupt(process):
    """Do what Ctrl-C does, and return what the program then said on stdout and stderr."""
    os.kill(process.pid, signal.SIGINT)
    out, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "same command" in errors
    assert "Traceback" not in errors
    return out, errors


def test_interrupted_search_saves_its_state_and_says_how_to_go_on(tmp_path):
    """Ctrl-C in the middle of a trial: exit code 130, the finished trial is kept, the other will be run again."""
    run = tmp_path / "run"
    arguments = search_arguments(write_space(tmp_path), run, "--objective", "quality", "--steps", "200", trials=2)
    with start([*arguments, "--json"]) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("trial 1: training"):
            assert process.poll() is None
        out, _ = interrupt(process)
    assert out == ""
    assert [trial.state for trial in load_study(run).trials] == ["finished", "running"]


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.1, 0.3])
def test_interrupt_while_libraries_load_ends_like_any_other(tmp_path, delay_s):
    """Torch aborts the process when an interrupt falls into its import: it is let finish first."""
    arguments = search_arguments(write_space(tmp_path), tmp_path / "run", "--steps", "100000", trials=1)
    with start(arguments) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch_cpu" not in maps.read_text():
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(delay_s)
        interrupt(process)


@pytest.mark.slow
def test_interrupted_search_on_ray_saves_its_state(tmp_path):
    """Ctrl-C reaches the search through Ray Tune, and what has not ended will be run again."""
    run = tmp_path / "run"
    options = ("--objective", "quality", "--steps", "100000", "--executor", "ray", "--workers", "2")
    with start(search_arguments(write_space(tmp_path), run, *options, trials=4)) as process:
        while journal_bytes(run).count(b'"event":"trial"') < 2:
            assert process.poll() is None
            time.sleep(0.1)
        interrupt(process)
    assert [trial.state for trial in load_study(run).trials] == ["running"] * 2
