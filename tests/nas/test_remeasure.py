"""Fronts: what is certain, what is possible, and how measuring again decides it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from codegen.measure import Latency as Record
from ir.errors import InputError, KernelCrash, StorageError, TrialFailure
from nas.callbacks import Callback
from nas.evaluate import Evaluator
from nas.front import Front, settle
from nas.goals import Goals
from nas.objectives.base import Context, Objective
from nas.objectives.custom import Custom
from nas.objectives.latency import Latency
from nas.objectives.params import Params
from nas.objectives.quality import Quality
from nas.objectives.recorded import Recorded
from nas.remeasure import groups, live_objective, remeasure
from nas.replay import replay
from nas.search import load_study, open_study, search
from nas.storages.journal import Journal, read_journal
from nas.study import Study
from nas.testing.spaces import Grid
from nas.training.budget import TrainOptions
from nas.trial import Outcome, Quantity, Source, Trial

MACHINE = {"cpu": "this one"}


def error(point):
    return float(sum((choice - 2) ** 2 for choice in point.choices))


@dataclass(frozen=True, kw_only=True)
class Clock(Objective):
    """A measurement that is luckier by 1 in its first attempt at trials in `lucky`."""

    name: str = "time"
    unit: str = "ms"
    source: Source = "measured"
    width: float = 0.1
    lucky: tuple[int, ...] = ()
    attempts: dict[int, int] = field(default_factory=dict, compare=False)
    needs_task: ClassVar[bool] = False

    def evaluate(self, context: Context) -> Quantity:
        attempt = self.attempts[context.number] = self.attempts.get(context.number, 0) + 1
        value = 10.0 - sum(context.architecture.choices) - (attempt == 1 and context.number in self.lucky)
        return self.quantity(value, (value - self.width, value + self.width))


@dataclass(frozen=True, kw_only=True)
class Score(Quality):
    """A quality that depends on the seed."""

    needs_task: ClassVar[bool] = False

    def evaluate(self, context: Context) -> Quantity:
        return self.quantity(error(context.architecture) + 0.1 * context.seed)


def trial(number: int, state: Any = "finished", **quantities: Quantity) -> Trial:
    goals = Goals.of([Custom(error, name=name) for name in quantities])
    losses = goals.losses(quantities)
    return Trial(number, str(number), {}, dict, state, quantities, losses)


def measured(value: float, width: float = 0.0, source: Source = "measured") -> Quantity:
    return Quantity(value, "", source, (value - width, value + width))


def two_goals() -> Goals:
    return Goals.of([Custom(error, name="a"), Custom(error, name="b")])


def split(*trials: Trial) -> tuple[set[int], set[int]]:
    front = Front.of(trials, two_goals())
    return {one.number for one in front.certain}, {one.number for one in front.possible}


def again(number: int, **quantities: Quantity) -> Trial:
    """A trial whose values were all measured again."""
    return trial(number, **quantities).changed(remeasured=dict(quantities))


def test_front_is_certain_only_where_no_interval_can_undo_it():
    """Overlap with a better model leaves both ends of it open; apart is decided."""
    apart = [again(0, a=measured(1, 0.1), b=measured(3)), again(1, a=measured(2, 0.1), b=measured(2))]
    assert split(*apart) == ({0, 1}, set())
    close = [again(0, a=measured(1, 0.6), b=measured(3)), again(1, a=measured(2, 0.6), b=measured(2))]
    assert split(*close) == ({1}, {0})
    beaten = [again(0, a=measured(1, 0.6), b=measured(2)), again(1, a=measured(2, 0.6), b=measured(3))]
    assert split(*beaten) == ({0}, {1})


def test_front_is_never_certain_before_measuring_again():
    """However far apart, one lucky measurement proves nothing."""
    assert split(trial(0, a=measured(1), b=measured(3))) == (set(), {0})


def test_front_is_not_certain_by_noise():
    """A second measurement on a machine that others use decides nothing."""
    noisy = Quantity(1.0, "ms", "measured", (0.9, 1.1), {"noisy": True})
    front = Front.of([again(0, a=noisy, b=measured(3))], two_goals())
    assert front.unsettled == {0: "a is noisy"}


@pytest.mark.parametrize("source", ["supernet", "proxy", "predicted"])
def test_front_is_never_certain_by_scores_that_stand_for_others(source):
    """Such a score is named as what is in the way."""
    front = Front.of([trial(0, a=measured(1, source="counted"), b=measured(3, source=source))], two_goals())
    assert [one.number for one in front.possible] == [0]
    assert source in front.unsettled[0]
    assert front.status(front.possible[0]) == "possible"


def by_supernet(number: int, cost: float, shared: float, alone: float | None = None) -> Trial:
    """A trial whose b a supernet scored, and that may have been trained alone after the search."""
    found = trial(number, a=measured(cost, source="counted"), b=measured(shared, source="supernet"))
    return found if alone is None else found.changed(remeasured={"b": measured(alone, source="trained")})


def test_front_of_a_supernet_search_is_certain_once_its_winners_are_trained_alone():
    """Scores trained alone are compared with each other; a supernet's, on another scale, with those of supernets."""
    trials = [by_supernet(0, 1, 9), by_supernet(1, 2, 8), by_supernet(2, 3, 8.5)]
    assert split(*trials) == (set(), {0, 1})
    trials[0] = by_supernet(0, 1, 9, alone=2.0)
    front = Front.of(trials, two_goals())
    assert [one.number for one in front.nominal] == [0]
    assert ([one.number for one in front.certain], front.unsettled) == ([0], {1: "b is from a supernet"})
    trials[1] = by_supernet(1, 2, 8, alone=1.0)
    assert split(*trials) == ({0, 1}, set())
    trials[1] = by_supernet(1, 2, 8, alone=3.0)
    assert split(*trials) == ({0}, set())


def test_front_of_a_supernet_search_is_doubted_by_better_scores_of_the_untrained():
    """Who was trained alone is not certain while another looks better by the supernet."""
    trials = [by_supernet(0, 2, 9, alone=2.0), by_supernet(1, 1, 8)]
    front = Front.of(trials, two_goals())
    assert front.certain == ()
    assert "look better" in front.unsettled[0]
    assert front.unsettled[1] == "b is from a supernet"


def test_front_has_no_winners_apart_where_none_has_all_values_of_the_better_kind():
    """Each of two trials lacks one of them: both stay on the front by what they have."""
    one = trial(0, a=measured(1, source="predicted"), b=measured(3, source="trained"))
    other = trial(1, a=measured(2, source="counted"), b=measured(2, source="supernet"))
    front = Front.of([one, other], two_goals())
    assert [trial.number for trial in front.nominal] == [0, 1]
    assert set(front.unsettled) == {0, 1}


def test_front_takes_counted_and_trained_values_as_they_are():
    """What repeats exactly needs no second look."""
    assert split(trial(0, a=measured(1, source="counted"), b=measured(3, source="trained"))) == ({0}, set())


def test_front_maximises_where_more_is_better():
    """Ends of an interval change places with the sign."""
    goals = Goals.of([Custom(error, name="a", direction="max"), Custom(error, name="b")])
    trials = [
        again(0, a=measured(1, 0.6), b=measured(2)).changed(losses=(-1.0, 2.0)),
        again(1, a=measured(2, 0.6), b=measured(3)).changed(losses=(-2.0, 3.0)),
    ]
    front = Front.of(trials, goals)
    assert ([one.number for one in front.certain], [one.number for one in front.possible]) == ([0], [1])


def test_settled_value_decides_feasibility():
    """A bound that only a lucky measurement kept is broken."""
    goals = Goals.of([Custom(error, name="a", max=1.5)])
    lucky = trial(0, a=measured(1.4)).changed(remeasured={"a": measured(1.6)})
    assert settle(lucky, goals).violation > 0
    assert Front.of([lucky], goals).nominal == ()


def lucky_study(folder, **options):
    """Trial 3 looks fastest of all by luck."""
    clock = Clock(lucky=(3,), **options)
    study = search(Grid((4, 4)), objectives=[clock, error], strategy="random", budget=16, storage=folder)
    return study, clock


def test_remeasure_takes_luck_off_the_front(tmp_path):
    """Values of the second measurement count; the search's own stay in the trials; points that come up get theirs."""
    study, clock = lucky_study(tmp_path)
    before = study.pareto_front()
    assert study.front().certain == ()
    front = remeasure(study)
    study.close()
    assert front.certain
    assert all("time" in one.remeasured for one in (*front.certain, *front.possible))
    truth = {one.number: (10.0 - sum(one.architecture.choices), error(one.architecture)) for one in study.trials}
    assert {one.number: (one.values["time"], one.values["error"]) for one in front.nominal} == {
        one.number: truth[one.number] for one in front.nominal
    }
    assert study.trials[3].values["time"] == truth[3][0] - 1
    loaded = load_study(tmp_path)
    assert loaded.front().describe() == front.describe()
    assert [one.number for one in loaded.pareto_front()] == [one.number for one in front.nominal]
    assert len(clock.attempts) == 16
    assert before


def test_remeasure_goes_on_after_an_interruption_and_repeats_nothing(tmp_path):
    """What was recorded before a kill is not measured again."""
    study, clock = lucky_study(tmp_path)

    class Stop(Callback):
        left = 2

        def on_stage(self, number: int, stage: str) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remeasure(study, callback=Stop())
    first = [record["trial"] for record in read_journal(tmp_path) if record["event"] == "remeasured"]
    assert len(first) == 1
    remeasure(study)
    remeasure(study)
    study.close()
    numbers = [record["trial"] for record in read_journal(tmp_path) if record["event"] == "remeasured"]
    assert numbers[:1] == first
    assert len(numbers) == len(set(numbers))
    assert max(clock.attempts.values()) == 2


def test_remeasure_again_looks_at_what_is_undecided(tmp_path):
    """Overlaps are measured once more when the user asks, and not otherwise."""
    study, clock = lucky_study(tmp_path, width=1.5)
    assert remeasure(study).possible
    attempts = dict(clock.attempts)
    remeasure(study)
    assert clock.attempts == attempts
    remeasure(study, again=True)
    study.close()
    assert max(clock.attempts.values()) == 3


def test_remeasure_changes_no_proposal(tmp_path):
    """A study that goes on after it proposes what it would have proposed without it."""
    with lucky_study(tmp_path / "whole")[0] as study:
        study.run(24)
        whole = [one.encoded for one in study.trials]
    study, _ = lucky_study(tmp_path / "parts")
    remeasure(study)
    with study:
        study.run(24)
        assert [one.encoded for one in study.trials] == whole
    assert replay(tmp_path / "parts", space=Grid((4, 4))).first is None


def test_remeasure_gives_up_on_what_cannot_be_measured(tmp_path):
    """One trial's failure is said and leaves it possible."""

    @dataclass(frozen=True, kw_only=True)
    class Fragile(Clock):
        def evaluate(self, context: Context) -> Quantity:
            if context.number in self.attempts:
                raise TrialFailure("gone")
            return super().evaluate(context)

    class Hear(Callback):
        said: ClassVar[list[str]] = []

        def on_notice(self, message: str) -> None:
            self.said.append(message)

    study = search(Grid((3, 3)), objectives=[Fragile(), error], strategy="random", budget=9)
    front = remeasure(study, callback=Hear())
    assert not front.certain
    assert "time of trial" in Hear.said[0]
    assert "gone" in Hear.said[0]


def test_remeasure_trains_with_other_seeds(tmp_path):
    """Quality becomes the mean over seeds with their range, and seeds that are known are not trained again."""
    study = search(Grid((3, 3)), objectives=[Score(name="score")], strategy="random", budget=9, seed=5)
    [best] = study.pareto_front()
    assert best.quantities["score"].interval is None
    [point] = remeasure(study, seeds=3).nominal
    quantity = point.quantities["score"]
    assert quantity.value == pytest.approx(0.6)
    assert quantity.interval == pytest.approx((0.5, 0.7))
    assert quantity.details["seeds"] == [5, 6, 7]
    assert remeasure(study, seeds=2).nominal[0].quantities["score"] == quantity
    with pytest.raises(InputError, match="seeds"):
        remeasure(study, seeds=0)


def test_remeasured_record_of_no_finished_trial_is_an_error(tmp_path):
    """A journal in which it comes before the trial's end does not fit together."""
    with open_study(Grid((3,)), objectives=[error], storage=tmp_path) as study:
        asked = study.ask()
        assert asked is not None
        with pytest.raises(StorageError, match="do not fit"):
            study.record_remeasured(asked.number, {"error": measured(1.0)})


def record_of(median_ms: float, width: float = 0.01) -> Record:
    interval = (median_ms - width, median_ms + width)
    return Record(median_ms, median_ms, median_ms, interval, 30, 1, 0.01, 1.0, False, "", 1.0, MACHINE)


@pytest.fixture
def bench(monkeypatch):
    """Stand in for compiler and clock: `times` gives each trial's latency, `calls` who was timed together."""
    found = SimpleNamespace(times={}, calls=[], broken=set())

    def compile_to(self, context, folder):
        path = folder / f"{context.number}.nas"
        path.write_text(str(context.number))
        return path

    def together(paths, *, threads, max_seconds):
        numbers = [int(path.stem) for path in paths]
        found.calls.append(numbers)
        if found.broken & set(numbers):
            raise KernelCrash("it crashed")
        return [record_of(found.times[number]) for number in numbers]

    monkeypatch.setattr(Latency, "compile", compile_to)
    monkeypatch.setattr("codegen.measure.measure_together", together)
    monkeypatch.setattr("codegen.machine.describe", lambda: MACHINE)
    return found


def latency_study(folder, latencies, machine: str = "this one"):
    """A study of made-up latencies; a later trial has a smaller error, so that all are on the front."""
    goals = Goals.of([Latency(), Custom(error)])
    with Study(Grid((64,)), Evaluator(goals), storage=Journal(folder)) as study:
        for place, latency_ms in enumerate(latencies):
            asked = study.ask()
            assert asked is not None
            latency = Quantity(latency_ms, "ms", "measured", (latency_ms, latency_ms), {"machine": machine})
            values = {"latency": latency, "error": Quantity(-float(place), "", "custom")}
            study.tell(asked.number, Outcome("finished", values))
    return load_study(folder, hold=True)


def test_remeasure_times_neighbours_together_and_the_rest_apart(tmp_path, bench):
    """A study that was only loaded has its latency revived; groups share a process, and the record says with whom."""
    bench.times = {0: 1.02, 1: 1.05, 2: 3.0}
    with latency_study(tmp_path, [1.0, 1.05, 3.0]) as study:
        front = remeasure(study)
    assert sorted(bench.calls) == [[0, 1], [0, 1], [2], [2]], "two processes each"
    assert [one.number for one in front.certain] == [0, 1, 2]
    assert front.certain[0].quantities["latency"].value == 1.02
    assert front.certain[0].quantities["latency"].details["together"] == [0, 1]


def test_remeasure_holds_the_intervals_of_both_processes(tmp_path, bench, monkeypatch):
    """What differs from process to process widens the interval; a machine that changed between them is noisy."""
    records = [record_of(1.0), replace(record_of(1.1), reference_ms=0.012)]
    monkeypatch.setattr("codegen.measure.measure_together", lambda paths, **options: [records.pop()])
    with latency_study(tmp_path, [1.0]) as study:
        [point] = remeasure(study).possible
    latency = point.quantities["latency"]
    assert latency.value == pytest.approx(1.05)
    assert latency.interval == pytest.approx((0.99, 1.11))
    assert latency.details["repeats"] == 60
    assert latency.details["noisy"]


def test_remeasure_measures_alone_what_breaks_together(tmp_path, bench):
    """One model that crashes keeps its neighbours from nothing."""
    bench.times, bench.broken = {0: 1.0, 1: 1.05}, {1}
    with latency_study(tmp_path, [1.0, 1.05]) as study:
        front = remeasure(study)
    assert bench.calls[:4] == [[0, 1], [0], [0], [1]]
    assert ([one.number for one in front.certain], [one.number for one in front.possible]) == ([0], [1])


def test_remeasure_leaves_alone_what_another_machine_measured(tmp_path, bench):
    """Times of two machines do not compare; the notice names the other one."""
    heard = []

    class Hear(Callback):
        def on_notice(self, message: str) -> None:
            heard.append(message)

    with latency_study(tmp_path, [1.0], machine="another") as study:
        front = remeasure(study, callback=Hear())
    assert bench.calls == []
    assert front.certain == ()
    assert "another" in heard[0]


def test_remeasured_objectives_come_back_from_their_records():
    """What a journal holds of latency and quality is enough to evaluate them again; other records are left."""
    study = search(Grid((2,)), objectives=[error], budget=1)
    latency = Latency(batch=4, max_ms=2.0, settle_seconds=0.0)
    quality = Quality(steps=7, options=TrainOptions(batch_size=4, learning_rate=1e-3))
    for objective in (latency, quality):
        recorded = Recorded.of(json.loads(json.dumps(objective.describe())))
        assert live_objective(recorded, study) == objective
    for objective in (Custom(error), Params()):
        assert live_objective(objective, study) is None
        assert live_objective(Recorded.of(objective.describe()), study) is None


def test_groups_are_neighbours_and_not_too_many():
    """A gap parts groups; a dozen is the most."""
    trials = [trial(number, time=measured(value)) for number, value in enumerate([1.0, 5.0, 1.05, 5.1, 9.0])]
    assert [[one.number for one in group] for group in groups(trials, "time")] == [[0, 2], [1, 3], [4]]
    many = [trial(number, time=measured(1.0)) for number in range(30)]
    assert [len(group) for group in groups(many, "time")] == [12, 12, 6]
