"""Latency in the loop: whom a measurement is held against, and on whose scale it ends. No claim about any time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from codegen.gpu.cuda.timing import GpuTiming
from codegen.measure import Latency as Record
from ir.errors import KernelCrash
from nas.evaluate import Evaluator
from nas.goals import Goals
from nas.objectives.base import Context
from nas.objectives.custom import Custom
from nas.objectives.latency import Latency, neighbours, rescale, scale_of
from nas.rivals import recent_rivals
from nas.study import Study
from nas.testing.spaces import Grid
from nas.trial import Outcome, Quantity, Rival


def record_of(median_ms: float, width: float = 0.01) -> Record:
    interval = (median_ms - width, median_ms + width)
    return Record(median_ms, median_ms, median_ms, interval, 30, 1, 0.01, 1.0, False, "", 1.0, {"cpu": "this one"})


def rival(trial: int, value: float, key: str = "") -> Rival:
    return Rival(trial, value, (value - 0.05, value + 0.05), key or f"key {trial}")


def test_neighbours_are_the_nearest_two_that_overlap():
    """Who is apart is settled already."""
    rivals = [rival(0, 1.04), rival(1, 1.01), rival(2, 0.97), rival(3, 2.0)]
    assert [one.trial for one in neighbours(1.0, (0.99, 1.01), rivals)] == [1, 2]
    assert neighbours(3.0, (2.99, 3.01), rivals) == []


def test_scale_puts_a_time_where_its_neighbours_recorded_theirs():
    """A machine that is slower by a tenth now makes everybody slower by a tenth; more than that is noise."""
    assert scale_of([(1.0, 1.1), (2.0, 2.2)]) == pytest.approx(1 / 1.1)
    scaled = rescale(record_of(1.21), 1 / 1.1)
    assert scaled.median_ms == pytest.approx(1.1)
    assert scaled.interval_ms == pytest.approx((1.2 / 1.1, 1.22 / 1.1))
    assert not scaled.noisy
    assert rescale(record_of(1.0), 1 / 1.2).noisy
    assert rescale(record_of(1.0), 1.2).noisy


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Stand in for compiler and clock: `alone` and `together` give times, `calls` tells who was timed together."""
    found = SimpleNamespace(alone=record_of(1.0, 0.02), together={}, calls=[], timing=[])

    def compile_to(self, context, folder):
        path = folder / f"candidate_{context.number}.nas"
        path.write_text(f"model {context.number}")
        return path

    def alone(path, *, threads, **timing):
        found.timing.append(timing)
        return found.alone

    def together(paths, *, threads, max_seconds, **timing):
        found.timing.append(timing)
        models = [path.read_text() for path in paths]
        found.calls.append(models)
        if not found.together:
            raise KernelCrash("it crashed")
        return [found.together[model] for model in models]

    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Latency, "compile", compile_to)
    monkeypatch.setattr("codegen.measure.measure_latency", alone)
    monkeypatch.setattr("codegen.measure.measure_together", together)
    return found


def evaluate(number: int, rivals: list[Rival], objective: Latency | None = None) -> Quantity:
    context = Context(None, number=number)
    context.rivals = {"latency": rivals}
    return (objective or Latency()).evaluate(context)


def first_rival() -> Rival:
    """Measure trial 0, which keeps its model, as a rival of the next."""
    quantity = evaluate(0, [])
    assert quantity.interval is not None
    return Rival(0, quantity.value, quantity.interval, quantity.details["candidate"])


def test_latency_is_settled_against_a_neighbour(bench):
    """Both are timed in turns, and the new one's time is put on the scale of the other's record."""
    other = first_rival()
    bench.together = {"model 0": record_of(1.05), "model 1": record_of(1.1)}
    quantity = evaluate(1, [other])
    assert bench.calls == [["model 1", "model 0"]]
    assert quantity.value == pytest.approx(1.1 / 1.05)
    assert quantity.details["settled"]["against"] == [0]
    assert quantity.details["settled"]["parted"]


def test_latency_that_stays_undecided_keeps_the_sharper_measurement(bench):
    """At the limit the overlap is said; the interval does not get wider by having tried."""
    other = first_rival()
    bench.together = {"model 0": record_of(1.0, 0.1), "model 1": record_of(1.01, 0.1)}
    quantity = evaluate(1, [other])
    assert quantity.value == 1.0
    assert not quantity.details["settled"]["parted"]


def test_latency_survives_a_neighbour_that_crashes_or_is_gone(bench):
    """The model's own measurement stands."""
    other = first_rival()
    quantity = evaluate(1, [other])
    assert (quantity.value, quantity.details["settled"]["parted"]) == (1.0, False)
    assert "settled" not in evaluate(2, [replace(other, key="nobody kept this")]).details


def test_latency_without_settling_keeps_no_models(bench, tmp_path):
    """With a limit of 0 nothing is timed twice or stored."""
    quantity = evaluate(1, [rival(0, 1.0)], Latency(settle_seconds=0.0))
    assert "candidate" not in quantity.details
    assert not (tmp_path / "candidates").exists()
    assert bench.calls == []


def test_cache_is_overwritten_where_asked(bench):
    """In every measurement of a study, the turns with neighbours included; otherwise clocks keep their ways."""
    other = first_rival()
    bench.together = {"model 0": record_of(1.05), "model 1": record_of(1.1)}
    assert bench.timing == [{}]
    evaluate(1, [other], Latency(cold_cache=True))
    assert bench.timing[1:] == 2 * [{"gpu": GpuTiming(flush_cache=True)}]
    assert Latency(cold_cache=True).settings == {"cold_cache": True}


def test_rivals_are_the_latest_measurements_that_were_kept():
    """Only what has an interval and a kept model can be timed again; other objectives want none."""
    goals = Goals.of([Latency(), Custom(lambda point: 0.0, name="cost")])
    study = Study(Grid((99,)), Evaluator(goals))
    for number in range(70):
        asked = study.ask()
        assert asked is not None
        details = {"candidate": f"key {number}"} if number != 68 else {}
        latency = Quantity(1.0 + number, "ms", "measured", (number, 2.0 + number), details)
        study.tell(asked.number, Outcome("finished", {"latency": latency, "cost": Quantity(0.0, "", "custom")}))
    found = recent_rivals(study)
    assert list(found) == ["latency"]
    assert [one.trial for one in found["latency"]] == [69, *range(67, 4, -1)]
    assert found["latency"][0] == Rival(69, 70.0, (69, 71.0), "key 69")
