"""Studies: ask and tell, what resuming checks, the front, and reading a run folder."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from ir.errors import InputError, NasError, StorageError
from nas.budget import Budget
from nas.callbacks import Callback
from nas.objectives.custom import Custom
from nas.search import load_study, open_study, search
from nas.storages.journal import Journal, read_journal
from nas.storages.memory import Memory
from nas.testing.spaces import Grid
from nas.trial import Outcome, Quantity

GRID = Grid((6, 6))


def rows(point):
    return float(point.choices[0])


def columns(point):
    return float(5 - point.choices[0] + abs(point.choices[1] - 2))


def asked(study):
    """Return a trial of a study that has one to give."""
    trial = study.ask()
    assert trial is not None
    return trial


def quantities(**values):
    return {name: Quantity(value, "", "custom") for name, value in values.items()}


def test_search_over_functions_needs_no_task_and_finds_the_front():
    """The whole grid, searched to exhaustion, has the front that the functions define."""
    study = search(GRID, objectives=[rows, columns], budget=1000)
    assert len(study.trials) == 36
    assert study.is_exhausted
    assert "no further architecture" in study.notices[-1]
    front = study.pareto_front()
    assert [trial.architecture.choices for trial in front] == [(row, 2) for row in range(6)]
    assert front[0].values == {"rows": 0.0, "columns": 5.0}
    assert front[0].sources == {"rows": "custom", "columns": "custom"}


def test_study_is_used_by_hand_with_ask_and_tell():
    """A trial is running until it is told, and is told once."""
    study = open_study(GRID, objectives=[Custom(rows, direction="max")])
    trial = asked(study)
    assert trial.state == "running"
    assert study.count()["running"] == 1
    study.tell(trial.number, Outcome("finished", quantities(rows=4.0)))
    assert study.trials[0].losses == (-4.0,)
    with pytest.raises(InputError, match="not running"):
        study.tell(trial.number, Outcome("finished", quantities(rows=4.0)))
    other = asked(study)
    with pytest.raises(InputError, match="without rows"):
        study.tell(other.number, Outcome("finished"))
    study.tell(other.number, Outcome("failed", reason="power cut"))
    assert study.trials[1].reason == "power cut"
    assert study.best().number == 0


def test_strategy_that_needs_results_waits_for_them():
    """`ask` gives nothing while a batch is running, and goes on once it is told."""
    study = open_study(GRID, objectives=[rows], strategy="regularized_evolution")
    trials = [asked(study) for _ in range(8)]
    assert study.ask() is None
    assert not study.is_exhausted
    for trial in trials:
        study.tell(trial.number, Outcome("finished", quantities(rows=1.0)))
    assert asked(study).number == 8


def test_best_honours_limits_with_and_without_units():
    """Limits go by objective name, and by name and unit."""
    time = Custom(columns, name="time", unit="ms")
    study = search(GRID, objectives=[rows, time], budget=36)
    assert study.best(max_time_ms=2.0).values == {"rows": 3.0, "time": 2.0}
    assert study.best("time", max_rows=2.0).values == {"rows": 2.0, "time": 3.0}
    assert study.best(min_rows=4.0).values["rows"] == 4.0
    with pytest.raises(InputError, match="no trial is within the limits"):
        study.best(max_time=-1.0)
    with pytest.raises(InputError, match="did you mean 'max_time_ms'"):
        study.best(max_time_s=1.0)
    with pytest.raises(InputError, match="did you mean 'rows'"):
        study.best("row")


def test_failing_objective_fails_its_trial_with_the_reason(tmp_path):
    """Whatever a user's function raises is in the journal, and the search goes on."""

    def fragile(point):
        if point.choices[0] == 3:
            raise ZeroDivisionError("three is too many")
        return math.nan if point.choices[0] == 4 else rows(point)

    study = search(GRID, objectives=[fragile], budget=36, storage=tmp_path)
    assert study.count() == {"finished": 24, "infeasible": 0, "failed": 12, "stopped": 0, "running": 0}
    failed = [record for record in read_journal(tmp_path) if record["event"] == "failed"]
    assert {record["reason"].partition("\n")[0] for record in failed} == {
        "ZeroDivisionError: three is too many",
        "TrialFailure: fragile is nan",
    }
    assert any("three is too many" in record["traceback"][-1] for record in failed)
    assert all(math.isfinite(trial.losses[0]) for trial in study.pareto_front())


def test_errors_of_the_study_stop_it_and_keep_what_is_done(tmp_path):
    """An input error would meet every trial: it ends the run, and the trial runs again after it is mended."""
    is_broken = True

    def needs_setup(point):
        if is_broken:
            raise InputError("no licence file")
        return rows(point)

    with pytest.raises(InputError, match="no licence file"):
        search(GRID, objectives=[needs_setup], budget=3, storage=tmp_path)
    is_broken = False
    study = search(GRID, objectives=[needs_setup], budget=3, storage=tmp_path)
    assert study.count()["finished"] == len(study.trials) == 3


def test_late_constraint_ends_a_trial_before_dearer_objectives():
    """An infeasible trial keeps what was evaluated, says why, and never meets what comes later."""
    trained = []

    def train(point):
        trained.append(point)
        return 1.0

    limit = Custom(columns, name="time", unit="ms", source="measured", max=3.0)
    study = search(GRID, objectives=[Custom(train, source="trained")], constraints=[limit], budget=36)
    broken = [trial for trial in study.trials if trial.state == "infeasible"]
    assert broken
    assert len(trained) == 36 - len(broken)
    assert broken[0].reason == f"time {columns(broken[0].architecture):.6g} ms is above 3 ms"
    assert broken[0].violation == pytest.approx((columns(broken[0].architecture) - 3) / 3)
    assert all(trial.values["time"] <= 3.0 for trial in study.pareto_front())


def test_cheap_constraint_costs_no_trial():
    """What a cheap constraint rules out is drawn again within the trial, and counted in its record."""
    storage = Memory()
    search(GRID, objectives=[rows], constraints=[Custom(columns, cheap=True, max=2.0)], budget=36, storage=storage)
    records = [record for record in storage.records() if record["event"] == "trial"]
    assert len(records) == sum(columns(point) <= 2.0 for point in GRID.enumerate())
    assert any(record.get("refused", {}).get("excluded") for record in records)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"strategy": "random"}, "strategy"),
        ({"objectives": [rows]}, "objectives"),
        ({"objectives": [rows, Custom(columns, direction="max")]}, "objectives"),
        ({"constraints": [Custom(columns, max=4.0)]}, "constraints"),
        ({"space": Grid((6, 7))}, "space"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(tmp_path, change, name):
    """A folder is one study; the error names the setting, both values and the way out."""
    arguments: Any = {"space": GRID, "objectives": [rows, columns], "budget": 4, "storage": tmp_path}
    search(**arguments)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(InputError, match=f"another {name}(.|\n)*expected: {name}(.|\n)*found: {name}") as error:
        search(**(arguments | change))
    assert "another folder" in str(error.value)
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    study = search(**(arguments | {"budget": 6}))
    assert len(study.trials) == 6, "more trials are not another study"


def test_finished_study_is_free_for_others_and_goes_on_when_asked(tmp_path):
    """`search` lets go of the folder; the study takes it up again."""
    study = search(GRID, objectives=[rows], budget=3, storage=tmp_path)
    Journal(tmp_path).close()
    study.run(5)
    study.close()
    assert len(load_study(tmp_path).trials) == 5


def test_loaded_study_shows_trials_front_and_files_without_holding_the_folder(tmp_path):
    """Reading needs neither the functions nor the space that the study was made with."""
    study = search(
        GRID, objectives=[rows, columns], constraints=[Custom(columns, max=4.0)], budget=20, storage=tmp_path
    )
    study.storage.write_file(0, "note.txt", b"kept")
    with study:
        study.record_artifact(0, "artifacts/trial_0.nas")
        loaded = load_study(tmp_path)
    assert [trial.number for trial in loaded.pareto_front()] == [trial.number for trial in study.pareto_front()]
    assert loaded.trials[0].artifact == "artifacts/trial_0.nas"
    assert loaded.read_file(0, "note.txt") == b"kept"
    assert loaded.count() == study.count()


def test_journal_of_a_newer_format_is_refused(tmp_path):
    """A version that cannot read a journal says which one can."""
    search(GRID, objectives=[rows], budget=2, storage=tmp_path)
    path = tmp_path / "journal.jsonl"
    path.write_text(path.read_text().replace('"format":1', '"format":2', 1))
    with pytest.raises(StorageError, match="expected: format 1"):
        search(GRID, objectives=[rows], budget=2, storage=tmp_path)
    with pytest.raises(StorageError, match="found: format 2"):
        load_study(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda records: records[:2] + records[3:],  # a result without its trial
        lambda records: [*records, records[-1]],  # a second result
        lambda records: [*records[:-1], records[-1] | {"values": {"rows": "many"}}],
        lambda records: records[1:],  # no study
    ],
    ids=["orphan", "twice", "no_number", "headless"],
)
def test_journal_whose_records_do_not_fit_is_refused(edit):
    """Valid JSON that tells no possible story is an error, not a guess."""
    storage = Memory()
    search(GRID, objectives=[rows], budget=1, storage=storage)
    with pytest.raises(StorageError, match=r"expected|begin"):
        search(GRID, objectives=[rows], budget=1, storage=Memory(edit(storage.records())))


def test_callbacks_hear_of_everything_in_order():
    """Start, each trial with its stages and result, the end; plain functions hear of results."""
    heard, results = [], []

    class Listener(Callback):
        def on_start(self, study):
            heard.append("start")

        def on_trial(self, study, trial):
            heard.append(("trial", trial.number))

        def on_stage(self, number, stage):
            heard.append((stage, number))

        def on_result(self, study, trial):
            heard.append(("result", trial.number))

        def on_notice(self, message):
            heard.append("notice")

        def on_end(self, study):
            heard.append("end")

    callbacks = [Listener(), lambda study, trial: results.append(trial.number)]
    search(Grid((1,)), objectives=[rows], budget=9, callbacks=callbacks)
    assert heard == ["start", ("trial", 0), ("rows", 0), ("result", 0), "notice", "end"]
    assert results == [0]


def test_interrupt_leaves_the_trial_to_be_run_again():
    """After an interrupt the same study, still in the process, first runs the trial that was cut off."""
    interrupted = []

    def slow(point):
        if len(interrupted) < 1:
            interrupted.append(point)
            raise KeyboardInterrupt
        return rows(point)

    study = open_study(GRID, objectives=[slow])
    with pytest.raises(KeyboardInterrupt):
        study.run(3)
    assert study.interrupted == 1
    study.run(3)
    assert study.trials[0].architecture == interrupted[0]
    assert study.count()["finished"] == 3


def test_files_are_written_before_the_record_that_needs_them():
    """A result never points to weights that are not there."""
    order = []

    class Recorder(Memory):
        def append(self, *records):
            order.extend(record["event"] for record in records)
            super().append(*records)

        def write_file(self, number, name, data):
            order.append(name)
            super().write_file(number, name, data)

    study = open_study(GRID, objectives=[rows], storage=Recorder())
    trial = asked(study)
    study.tell(trial.number, Outcome("finished", quantities(rows=1.0), files={"weights": b"1"}))
    assert order == ["study", "trial", "weights", "finished"]
    assert study.read_file(0, "weights") == b"1"


@pytest.mark.parametrize("fields", [{}, {"trials": 0}, {"trials": 1.5}, {"hours": -1}, {"hours": math.inf}])
def test_budget_needs_a_positive_limit(fields):
    """A budget that ends never or at once is refused."""
    with pytest.raises(InputError, match="expected"):
        Budget(**fields)


def test_time_budget_ends_a_run(monkeypatch):
    """No trial is begun once the time is over."""
    clock = iter(range(0, 10**6, 600))
    monkeypatch.setattr("nas.run.time.monotonic", lambda: float(next(clock)))
    study = open_study(GRID, objectives=[rows])
    study.run(Budget(hours=1))
    assert 1 <= len(study.trials) <= 6


@pytest.mark.parametrize(
    "arguments", [{"seed": -1}, {"seed": 1.0}, {"objectives": []}, {"strategy": "genetic"}, {"executor": "x"}]
)
def test_bad_arguments_are_refused_with_what_was_expected(arguments):
    """Every bad argument is an input error."""
    with pytest.raises(InputError, match="expected"):
        search(GRID, **({"objectives": [rows], "budget": 1} | arguments))


def test_objective_that_needs_a_task_says_so():
    """A space without a task cannot be trained on."""
    with pytest.raises(NasError, match="need a task"):
        search(GRID, objectives=["quality"])


def test_journal_of_a_hundred_thousand_trials_opens(tmp_path):
    """Architectures are decoded when they are looked at, so a long study opens without touching each."""

    class Counting(Grid):
        decoded = 0

        def architecture(self, data):
            Counting.decoded += 1
            return super().architecture(data)

    space = Counting((10, 10, 10, 10, 10))
    search(space, objectives=[rows], budget=1, storage=tmp_path)
    Counting.decoded = 0
    trial, finished = map(json.loads, (tmp_path / "journal.jsonl").read_text().splitlines()[-2:])
    with (tmp_path / "journal.jsonl").open("a") as file:
        for number in range(1, 100_000):
            for record in (trial, finished):
                file.write(json.dumps(record | {"trial": number, "hash": str(number)}) + "\n")
    study = open_study(space, objectives=[rows], storage=tmp_path)
    study.close()
    assert len(study.trials) == study.count()["finished"] == 100_000
    assert Counting.decoded == 0
