"""Tuning: candidates that fail cost themselves only, records survive, a second run measures nothing."""

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from codegen import targets, trials, tuning
from codegen._tvm import PrimFunc, te
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.targets import Target
from codegen.trials import Candidate
from codegen.tuning import Record, TuningDatabase, tune
from ir.errors import StorageError
from ir.types import TensorType


@dataclass(frozen=True)
class ScaleKernel(Kernel):
    """`y = 3 x`; each candidate behaves as its knob says."""

    family = "test_scale"
    n: int = 64
    first: str = "good"
    others: str = ""

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        return (TensorType((self.n,)),)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        return (TensorType((self.n,)),)

    def knobs(self, isa: Isa) -> Knobs:
        return {"behaviour": self.first, "lanes": isa.lanes}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        names = [self.first, *(name for name in self.others.split() if name)]
        return [{"behaviour": name, "lanes": isa.lanes} for name in names]

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        behaviour = str(knobs["behaviour"])
        if behaviour == "crash":
            os.abort()
        if behaviour == "hang":
            time.sleep(1000)
        if behaviour == "raise":
            raise RuntimeError("no such schedule")
        x = te.placeholder((self.n,), name="x")
        factor = {"wrong": 4.0, "nan": float("nan")}.get(behaviour, 3.0)
        work = 2000 if behaviour == "slow" else 1
        k = te.reduce_axis((0, work), name="k")
        y = te.compute((self.n,), lambda i: te.sum(x[i] * np.float32(factor / work), axis=k), name="y")
        return te.create_prim_func([x, y])  # pyright: ignore[reportArgumentType]  # a compute of one output is a tensor

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (3 * arrays[0].astype(np.float64),)

    @property
    def flops(self) -> int:
        return self.n


@dataclass(frozen=True)
class DecayKernel(ScaleKernel):
    """A recurrence whose state explodes on positive logarithmic decays."""

    family = "test_decay"

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        state, out = np.float64(1), np.empty(self.n)
        for i, decay in enumerate(arrays[0].astype(np.float64)):
            state = state * np.exp(4 * abs(decay) if decay > 0 else decay) + 1
            out[i] = state
        return (out,)


@pytest.fixture(scope="module")
def target() -> Target:
    """This machine with one thread."""
    return targets.get("cpu", threads=1)


@pytest.fixture
def database(tmp_path: Path) -> TuningDatabase:
    """An empty database."""
    return TuningDatabase(tmp_path / "tuning")


def statuses(record: Record | None) -> list[str]:
    """List how the candidates of a record ended."""
    assert record is not None
    return [candidate["status"] for candidate in record.tried]


def record_of(kernel: str, ms: float = 1.0) -> Record:
    """Make a record of nothing that was measured."""
    return Record(kernel, "cpu-x", "ok", {"a": 1}, ms, 2.0, (), versions={}, written="2000-01-01T00:00:00+00:00")


def test_tune_failing_candidates_cost_themselves_only(target: Target, database: TuningDatabase):
    """A crash, a hang, an exception and wrong results are recorded with their reasons; the others go on."""
    kernel = ScaleKernel(others="crash hang raise wrong nan good2")
    found = tune([kernel], target, database, trials=10, timeout_s=3.0)
    record = database.record(kernel, target)
    assert statuses(record) == ["ok", "crash", "timeout", "error", "wrong", "wrong", "ok"]
    assert record is not None
    assert "SIGABRT" in record.tried[1]["reason"]
    assert "no such schedule" in record.tried[3]["reason"]
    assert found[kernel.key]["behaviour"] in ("good", "good2")


def test_tune_prefers_what_is_clearly_faster(target: Target, database: TuningDatabase):
    """With a rule that is some hundred times slower than an alternative, the alternative is taken."""
    kernel = ScaleKernel(first="slow", others="good")
    assert tune([kernel], target, database, trials=2)[kernel.key]["behaviour"] == "good"
    record = database.record(kernel, target)
    assert record is not None
    assert record.ms is not None
    assert record.rule_ms is not None
    assert record.ms < record.rule_ms


def test_tune_second_run_measures_nothing(target: Target, database: TuningDatabase, monkeypatch: pytest.MonkeyPatch):
    """What has a record, good or bad, is not tried again, in this process or in the next."""
    kernels = [ScaleKernel(n=32), ScaleKernel(n=16, first="wrong")]
    first = tune(kernels, target, database, trials=4)
    before = database.path.read_bytes()
    monkeypatch.setattr(tuning, "_tune_kernel", lambda *_: pytest.fail("a candidate was measured again"))
    again = TuningDatabase(database.path.parent)
    assert tune(kernels, target, again, trials=4) == first
    assert list(first) == [kernels[0].key]
    assert database.path.read_bytes() == before


class ScriptedWorkshop(tuning._Workshop):
    """Answers every comparison with the same rounds."""

    def __init__(self, rounds: list[list[float]]) -> None:
        self.rounds = rounds
        self.compared: list[list[Candidate]] = []

    def compare(self, kernel: Kernel, candidates: Sequence[Candidate]) -> list[list[float]]:
        """Return the scripted rounds."""
        self.compared.append(list(candidates))
        return self.rounds


def choose(workshop: tuning._Workshop, target: Target, *ms: float | None) -> Record:
    """Choose among candidates that were timed alone; None is one that crashed."""
    candidates = [({"a": number}, f"{number}.so") for number in range(len(ms))]
    tried = [
        {"knobs": knobs, "status": "crash" if time is None else "ok"} | ({} if time is None else {"ms": time})
        for (knobs, _), time in zip(candidates, ms, strict=True)
    ]
    return tuning._choose(workshop, ScaleKernel(), target, candidates, tried)


@pytest.mark.parametrize(("wins", "chosen"), [(5, 0), (6, 1)])
def test_tune_keeps_rule_unless_challenger_wins_the_duel(target: Target, wins: int, chosen: int):
    """A candidate that was faster once must be so again, in turns with the rule's choice; the record tells of both."""
    rounds = [[1.0, 0.9]] * wins + [[1.0, 0.99]] * (7 - wins)
    record = choose(ScriptedWorkshop(rounds), target, 1.0, 0.8)
    assert record.knobs == {"a": chosen}
    assert record.ms == [1.0, 0.9][chosen]
    assert record.rule_ms == 1.0
    assert record.duel == {"knobs": {"a": 1}, "ms": 0.9, "rule_ms": 1.0, "wins": wins, "rounds": 7}


def test_tune_lets_the_two_fastest_challenge_the_rule(target: Target):
    """Of the candidates, the two that were fastest alone meet the rule's choice, and the faster in turns is taken."""
    workshop = ScriptedWorkshop([[1.0, 0.9, 0.8]] * 7)
    record = choose(workshop, target, 1.0, 0.7, 0.9, 0.6, None)
    assert [[knobs["a"] for knobs, _ in candidates] for candidates in workshop.compared] == [[0, 3, 1]]
    assert record.knobs == {"a": 1}
    assert (record.ms, record.rule_ms) == (0.8, 1.0)


def test_tune_asks_no_duel_that_the_rule_has_won(target: Target):
    """A rule that was fastest alone is chosen as it is."""
    workshop = ScriptedWorkshop([])
    record = choose(workshop, target, 1.0, 1.1)
    assert not workshop.compared
    assert (record.knobs, record.ms, record.rule_ms, record.duel) == ({"a": 0}, 1.0, 1.0, None)


def test_tune_takes_what_works_when_the_rule_does_not(target: Target):
    """With a rule that crashes there is nothing to beat."""
    record = choose(ScriptedWorkshop([]), target, None, 0.9)
    assert record.knobs == {"a": 1}
    assert record.rule_ms is None


def test_slow_candidate_is_timed_a_few_times_only(monkeypatch: pytest.MonkeyPatch, target: Target):
    """One that is far behind the best costs three samples; without a best it is timed like any other."""
    samples: list[int] = []

    def count(run: object, group: int = 1) -> float:
        samples.append(group)
        return 1e-3

    monkeypatch.setattr(trials, "time_call", count)
    monkeypatch.setattr(trials, "_runnable", lambda *_: lambda: None)
    candidate = ({"a": 0}, "0.so")
    assert trials.time_candidate(ScaleKernel(), target, candidate, best_ms=0.5) == pytest.approx(1.0)
    assert len(samples) == 3
    samples.clear()
    trials.time_candidate(ScaleKernel(), target, candidate, best_ms=0.9)
    assert len(samples) >= 5


@pytest.mark.parametrize(
    ("trials", "counts"), [(0, []), (1, [1]), (2, [1, 1]), (4, [2, 2]), (6, [3, 3]), (7, [4, 3]), (100, [8, 3])]
)
def test_tune_shares_trials_out(target: Target, trials: int, counts: Sequence[int]):
    """Trials are shared evenly, what one kernel cannot use goes to the next, and the rule's choice is always tried."""
    kernels = [ScaleKernel(n=8, others="b c d e f g h"), ScaleKernel(n=4, others="b c")]
    plan = tuning._share_out(kernels, target, trials)
    assert [len(candidates) for _, candidates in plan] == list(counts)
    assert all(candidates[0] == kernel.knobs(target.isa) for kernel, candidates in plan)


def test_tune_reports_progress(target: Target, database: TuningDatabase):
    """Progress counts candidates up to their number."""
    calls: list[tuple[int, int]] = []
    tune(
        [ScaleKernel(others="good2")],
        target,
        database,
        trials=2,
        progress=lambda done, total, _: calls.append((done, total)),
    )
    assert calls == [(0, 2), (1, 2), (2, 2)]


def test_tune_operands_keep_recurrences_in_range():
    """Operands are drawn so that a decaying recurrence stays finite."""
    inputs, results = trials.sample_operands(DecayKernel(n=512))
    assert (inputs[0] <= 0).all()
    assert np.isfinite(results[0]).all()


def test_database_reads_back_records(database: TuningDatabase):
    """A record comes back as it was; the last one of a workload counts."""
    database.add(record_of("a", 1.0))
    database.add(record_of("b", 2.0))
    database.add(record_of("a", 3.0))
    again = TuningDatabase(database.path.parent)
    assert len(again) == 2
    assert again._records[("a", "cpu-x")] == Record(**{**vars(record_of("a", 3.0)), "tried": []})


def test_database_survives_truncated_line(database: TuningDatabase):
    """A line that a crash cut short is skipped, and does not swallow the next one."""
    database.add(record_of("a"))
    database.add(record_of("b"))
    whole = database.path.read_bytes()
    database.path.write_bytes(whole[:-20])
    assert len(TuningDatabase(database.path.parent)) == 1
    database.add(record_of("c"))
    again = TuningDatabase(database.path.parent)
    assert len(again) == 2
    assert {key for key, _ in again._records} == {"a", "c"}


@pytest.mark.parametrize(
    "line",
    ["", "[]", "null", "{}", '{"format_version": 99}', '{"format_version": 1}', '{"format_version": 2}', "\x00\xff"],
)
def test_database_skips_foreign_lines(database: TuningDatabase, line: str):
    """Lines of other versions, and rubbish, hide nothing else."""
    database.add(record_of("a"))
    with database.path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    database.add(record_of("b"))
    assert len(TuningDatabase(database.path.parent)) == 2


def test_database_sees_records_of_other_processes(database: TuningDatabase):
    """An open database finds what another one adds meanwhile."""
    other = TuningDatabase(database.path.parent)
    assert len(database) == 0
    other.add(record_of("a"))
    assert len(database) == 1


def add_many(folder: str, name: str, count: int) -> None:
    """Add records from a process of its own."""
    database = TuningDatabase(folder)
    for index in range(count):
        database.add(record_of(f"{name}{index}" + "x" * 5000))


def test_database_serves_concurrent_writers(database: TuningDatabase):
    """Records that several processes write at once, longer than a pipe or page holds, are all there and whole."""
    context = multiprocessing.get_context("spawn")
    folder = str(database.path.parent)
    writers = [context.Process(target=add_many, args=(folder, name, 20)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(database) == 40
    assert all(json.loads(line) for line in database.path.read_text().splitlines())


def test_database_forgets_knobs_the_generator_no_longer_has(target: Target, database: TuningDatabase):
    """Knobs of an older kernel generator are not used."""
    kernel = ScaleKernel()
    known = Record(kernel.key, target.fingerprint, "ok", kernel.knobs(target.isa), 1.0, 1.0)
    database.add(known)
    assert database.knobs(kernel, target) == kernel.knobs(target.isa)
    database.add(Record(kernel.key, target.fingerprint, "ok", {"tile": 7}, 1.0, 1.0))
    assert database.knobs(kernel, target) is None


def test_database_lies_where_it_is_told(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder comes from the argument, else the environment, else the cache; each target has its own."""
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NAS_TUNING_DIR", raising=False)
    name = target.fingerprint
    assert TuningDatabase.for_target(target).path.parent == tmp_path / "cache" / "tuning" / name
    monkeypatch.setenv("NAS_TUNING_DIR", str(tmp_path / "shared"))
    assert TuningDatabase.for_target(target).path.parent == tmp_path / "shared" / name
    assert TuningDatabase.for_target(target, tmp_path / "flag").path.parent == tmp_path / "flag" / name


def test_database_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    """The error names the file and the way out."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="NAS_TUNING_DIR"):
        TuningDatabase(tmp_path / "file").add(record_of("a"))
