"""The journal: what is written stays, whatever ends the process or fills the disk."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys

import pytest

from ir.errors import StorageError
from nas.executors.base import Job
from nas.search import open_study
from nas.storages import journal as journal_module
from nas.storages.journal import Journal, has_journal, read_journal
from nas.testing.spaces import Grid

RECORDS = [
    {"event": "study", "format": 1},
    {"event": "trial", "trial": 0, "hash": "a"},
    {"event": "failed", "trial": 0},
]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    with_records(path, RECORDS)
    return path


def with_records(path, records):
    journal = Journal(path)
    journal.append(*records)
    journal.close()


def reopened(path):
    journal = Journal(path)
    records, notices = journal.records(), journal.notices
    journal.close()
    return records, notices


def test_journal_keeps_records_in_order_one_a_line(folder):
    """The file is JSON lines, and opening it gives them back."""
    lines = (folder / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS
    assert reopened(folder) == (RECORDS, ())
    assert read_journal(folder) == RECORDS
    assert has_journal(folder)
    assert not has_journal(folder.parent)


def test_journal_cut_at_every_byte_of_its_last_record_loses_at_most_that(folder):
    """Any torn end is dropped with a notice, and the journal goes on from there."""
    path = folder / "journal.jsonl"
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        records, notices = reopened(folder)
        assert records == RECORDS[:2]
        assert len(notices) == (size > start)
        assert path.read_bytes() == whole[:start]
        with_records(folder, RECORDS[2:])
        assert path.read_bytes() == whole


def test_journal_cut_within_its_first_record_is_empty(folder):
    """A study that never got its first record down starts anew."""
    (folder / "journal.jsonl").write_bytes(b'{"event":"stu')
    records, notices = reopened(folder)
    assert records == []
    assert "cut short" in notices[0]


@pytest.mark.parametrize("line", [b"{bad\n", b"[1]\n", b'{"trial":1}\n', b"\n", b"\xff\xfe\n", b"\0\0\0\n"])
def test_journal_with_a_damaged_line_is_refused_by_line(folder, line):
    """Damage that no crash explains is an error with its place; the file is left as it is."""
    path = folder / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(1, line)
    path.write_bytes(b"".join(lines))
    with pytest.raises(StorageError, match=r"journal\.jsonl:2"):
        Journal(folder)
    assert path.read_bytes() == b"".join(lines)
    with pytest.raises(StorageError, match=r"journal\.jsonl:2"):
        read_journal(folder)


def test_journal_refuses_a_second_holder_and_names_it(folder):
    """One study at a time, within a process and between processes."""
    journal = Journal(folder)
    with pytest.raises(StorageError, match=f"another study is running(.|\n)*process {os.getpid()}"):
        Journal(folder)
    code = "import sys; from nas.storages.journal import Journal; Journal(sys.argv[1])"
    other = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert f"held by process {os.getpid()}" in other.stderr
    assert len(read_journal(folder)) == 3, "reading needs no hold"
    journal.close()
    assert reopened(folder)[0] == RECORDS


def test_journal_is_free_after_its_holder_was_killed(folder):
    """The hold ends with the process, even one that could not say goodbye."""
    code = "import os, sys; from nas.storages.journal import Journal; Journal(sys.argv[1]); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == -9
    assert reopened(folder)[0] == RECORDS


def test_closed_journal_is_taken_up_again_by_append(folder):
    """After `close` others may use the folder; writing again is fine when nobody did."""
    journal = Journal(folder)
    journal.close()
    journal.append({"event": "more"})
    journal.close()
    assert reopened(folder)[0] == [*RECORDS, {"event": "more"}]


def test_closed_journal_refuses_to_write_after_another_did(folder):
    """Records of two processes are never mixed up."""
    journal = Journal(folder)
    journal.close()
    with_records(folder, [{"event": "theirs"}])
    with pytest.raises(StorageError, match="another process went on"):
        journal.append({"event": "ours"})
    assert reopened(folder)[0][-1] == {"event": "theirs"}


class FullDisk:
    """`os.write` on a disk that takes so many bytes more."""

    def __init__(self, room):
        self.room = room
        self.write = os.write

    def __call__(self, descriptor, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.write(descriptor, data[: self.room])
        self.room -= taken
        return taken


@pytest.mark.parametrize("room", [0, 1, 10])
def test_full_disk_is_an_error_that_loses_nothing(folder, monkeypatch, room):
    """A record that does not fit is taken back whole; once there is room the journal goes on."""
    journal = Journal(folder)
    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "write", FullDisk(room))
        with pytest.raises(StorageError, match="No space left on device"):
            journal.append({"event": "finished", "trial": 0})
    assert read_journal(folder) == RECORDS == journal.records()
    journal.append({"event": "finished", "trial": 0})
    journal.close()
    assert reopened(folder) == ([*RECORDS, {"event": "finished", "trial": 0}], ())


def test_full_disk_leaves_no_partial_file(folder, monkeypatch):
    """A trial's file is whole or not there, and an older version survives."""
    journal = Journal(folder)
    journal.write_file(3, "weights", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "write", FullDisk(2))
        with pytest.raises(StorageError, match="No space left on device"):
            journal.write_file(3, "weights", b"newer")
    assert journal.read_file(3, "weights") == b"old"
    assert [path.name for path in (folder / "trials" / "3").iterdir()] == ["weights"]
    assert journal.read_file(4, "weights") is None
    journal.close()


def test_read_only_folder_is_a_clear_error(folder, monkeypatch):
    """A folder that cannot be written is refused before anything is done."""

    def refuse(path, flags, mode=0o777):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(journal_module.os, "open", refuse)
    with pytest.raises(StorageError, match=r"cannot be written(.|\n)*Read-only file system"):
        Journal(folder)


def test_run_folder_that_is_a_file_is_a_clear_error(tmp_path):
    """A path that cannot be a folder is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        Journal(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot be made"):
        Journal(tmp_path / "file" / "below")


def test_reading_a_folder_without_a_study_says_so(tmp_path):
    """A wrong folder is told apart from a damaged one."""
    with pytest.raises(StorageError, match="holds no study"):
        read_journal(tmp_path)


def test_journal_writes_no_value_that_json_cannot_hold(folder):
    """Infinity would make a file that other tools cannot read."""
    journal = Journal(folder)
    with pytest.raises(ValueError, match="JSON compliant"):
        journal.append({"event": "finished", "value": float("inf")})
    journal.close()
    assert reopened(folder)[0] == RECORDS


def test_study_cut_at_every_byte_of_its_last_record_loses_at_most_that_and_says_so(tmp_path):
    """Whether a proposal or a result is torn, the study opens, tells, and goes on to the same journal."""
    study = open_study(Grid((4, 4)), objectives=[len_of], storage=tmp_path, strategy="random")
    study.run(3)
    study.ask()
    study.close()
    path = tmp_path / "journal.jsonl"
    proposed = path.read_bytes()
    ended = proposed[: proposed[:-1].rfind(b"\n") + 1]
    for whole, states in ((proposed, ["finished"] * 3), (ended, ["finished"] * 2 + ["running"])):
        start = whole[:-1].rfind(b"\n") + 1
        for size in range(start, len(whole)):
            path.write_bytes(whole[:size])
            with open_study(Grid((4, 4)), objectives=[len_of], storage=tmp_path, strategy="random") as again:
                assert [trial.state for trial in again.trials] == states
                assert [f"cut short ({size - start} bytes)" in notice for notice in again.notices] == [True] * (
                    size > start
                )
            assert path.read_bytes() == whole[:start]


def len_of(point):
    return float(sum(point.choices))


@pytest.fixture
def syncs(monkeypatch):
    """Count what is synced, on a clock that stands still: nothing is synced for being late."""
    counted = []
    fsync = os.fsync
    monkeypatch.setattr(journal_module.os, "fsync", lambda descriptor: (counted.append(descriptor), fsync(descriptor)))
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: 1000.0)
    return counted


def test_ended_trials_are_on_the_disk_before_the_next_is_asked(tmp_path, syncs):
    """Results that come together share one sync, and no trial begins before it."""
    study = open_study(Grid((8, 8)), objectives=[len_of], storage=tmp_path, strategy="random")
    trials = [trial for trial in (study.ask() for _ in range(8)) if trial is not None]
    study.storage.sync()
    before = len(syncs)
    for trial in trials:
        study.tell(trial.number, study.evaluator(Job(trial.number, trial.architecture)))
    assert len(syncs) == before
    study.ask()
    assert len(syncs) == before + 1
    study.close()
    assert len(syncs) == before + 2, "the proposal"
    study.close()
    assert len(syncs) == before + 2


def test_record_is_synced_at_once_when_the_last_sync_is_long_ago(folder, monkeypatch, syncs):
    """Trials that take seconds do not wait for the next one to be safe."""
    journal = Journal(folder)
    journal.append({"event": "a"})
    before = len(syncs)
    journal.append({"event": "b"})
    assert len(syncs) == before
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: 1001.0)
    journal.append({"event": "c"})
    assert len(syncs) == before + 1
    journal.close()


def test_architecture_is_packed_until_it_is_read(tmp_path):
    """A journal gives architectures back as they were, equal to dictionaries; a damaged one is refused at once."""
    record = {"event": "trial", "trial": 0, "hash": "a", "architecture": {"x": [1, {"y": None}]}, "time": 1.5}
    with_records(tmp_path, [record])
    (read,) = read_journal(tmp_path)
    assert read == record == read
    assert json.loads(json.dumps(dict(read["architecture"]))) == record["architecture"]
    assert type(pickle.loads(pickle.dumps(read["architecture"]))) is dict
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"y":null}', b'{"y":}'))
    with pytest.raises(StorageError, match=r"journal\.jsonl:1"):
        read_journal(tmp_path)
