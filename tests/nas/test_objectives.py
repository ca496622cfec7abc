"""Objectives: what they record, how constraints join them, and what they hand on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from ir.errors import InputError, TargetUnavailable
from nas.evaluate import Evaluator
from nas.executors.base import Job
from nas.goals import Goals
from nas.objectives.base import REGISTRY, Context, Objective
from nas.objectives.custom import Custom
from nas.objectives.flops import Flops
from nas.objectives.latency import Latency
from nas.objectives.params import Params
from nas.objectives.quality import Quality
from nas.objectives.recorded import Recorded
from nas.objectives.state_bytes import StateBytes
from nas.search import open_study, space_constraints
from nas.testing.spaces import Grid, Point
from nas.trial import Quantity, Source


def total(point):
    return float(sum(point.choices))


@dataclass(frozen=True, kw_only=True)
class Fixed(Objective):
    """An objective with a given value that notes when it was asked."""

    value: float = 1.0
    log: tuple[list, ...] = ()
    max: float | None = None

    @property
    def bounds(self):
        return None, self.max

    def evaluate(self, context: Context) -> Quantity:
        for entries in self.log:
            entries.append(self.name)
        return self.quantity(self.value)


@pytest.mark.parametrize(
    ("objective", "name", "bounds"),
    [
        (Params(max=20e6), "params", (None, 20e6)),
        (Flops(min=1), "flops", (1, None)),
        (StateBytes(max=4096, length=128), "state_bytes", (None, 4096)),
        (Latency(max_ms=5.0), "latency", (None, 5.0)),
        (Quality(max=2.5), "quality", (None, 2.5)),
        (Custom(total, max=3), "total", (None, 3)),
    ],
)
def test_objective_survives_its_own_record(objective, name, bounds):
    """What a journal keeps of an objective is enough to judge recorded values by it."""
    recorded = Recorded.of(objective.describe())
    assert objective.name == recorded.name == name
    assert objective.bounds == recorded.bounds == bounds
    assert (objective.unit, objective.direction, objective.source) == (
        recorded.unit,
        recorded.direction,
        recorded.source,
    )
    assert recorded.settings == objective.settings


def test_objectives_are_found_by_file_name():
    """File stem, registry key and default name go together."""
    for name in ("quality", "latency", "params", "flops", "state_bytes"):
        assert REGISTRY.make(name).name == name
    with pytest.raises(InputError, match="did you mean 'latency'"):
        Goals.of(["latencey"])


def test_settings_tell_measurements_apart():
    """Only what differs from the default is recorded, so a default that is spelt out changes nothing."""
    assert Latency(batch=1).settings == {}
    assert Latency(batch=8, seq_len=64).settings == {"batch": 8, "seq_len": 64}
    assert Quality(steps=10).settings == {"steps": 10}


def test_evaluation_goes_from_cheap_to_dear():
    """Counted values come first, then measured ones, then training, whatever the order given."""
    log = []
    names: dict[Source, str] = {"trained": "quality", "custom": "score", "measured": "latency", "counted": "params"}
    given = [Fixed(name=name, source=source, log=(log,)) for source, name in names.items()]
    outcome = Evaluator(Goals.of(given))(Job(0, Point((1,))))
    assert outcome.state == "finished"
    assert log == ["params", "latency", "score", "quality"]


def test_constraint_on_an_objective_evaluates_it_once():
    """A constraint of the same name and no settings of its own bounds the objective's value."""
    goals = Goals.of([Latency(batch=8, seq_len=64), "params"], [Latency(max_ms=5.0), Params(max=10)])
    assert [metric.name for metric in goals.metrics] == ["params", "latency"]
    assert goals.metrics[1].settings == {"batch": 8, "seq_len": 64}
    assert [(bound.name, bound.high) for bound in goals.bounds] == [("latency", 5.0), ("params", 10)]


def test_one_name_for_two_measurements_is_refused():
    """Two latencies need two names."""
    with pytest.raises(InputError, match="two different objectives are named latency"):
        Goals.of([Latency()], [Latency(batch=8, max_ms=5.0)])
    with pytest.raises(InputError, match="two different objectives are named latency"):
        Goals.of([Latency(), Latency(batch=8)])
    goals = Goals.of([Latency(), Latency(batch=8, name="latency_8")])
    assert [metric.name for metric in goals.metrics] == ["latency", "latency_8"]


def test_constraint_without_a_bound_is_refused():
    """A constraint that demands nothing is a mistake."""
    with pytest.raises(InputError, match="bounds nothing"):
        Goals.of([Latency()], [Params()])


@pytest.mark.parametrize(("value", "violation"), [(4.0, 0.0), (2.0, 0.0), (1.0, 0.5), (6.0, 0.5)])
def test_violation_is_the_share_of_the_bound(value, violation):
    """How far a bound is broken does not depend on its unit."""
    goals = Goals.of([Custom(total, min=2.0, max=4.0)])
    quantities = {"total": Quantity(value, "", "custom")}
    assert goals.violation(quantities) == violation
    assert bool(goals.broken(quantities)) == (violation > 0)


def test_custom_objective_needs_a_function_with_a_name():
    """A lambda must be named, and what it returns must be a number."""
    with pytest.raises(InputError, match="needs a name"):
        Goals.of([lambda point: 1.0])
    with pytest.raises(InputError, match="callable"):
        Custom(3)  # type: ignore[arg-type]
    text: Any = Custom(lambda point: "high", name="text")  # type: ignore[arg-type]
    outcome = Evaluator(Goals.of([text]))(Job(0, Point((1,))))
    assert (outcome.state, outcome.reason.partition(":")[0]) == ("failed", "TrialFailure")


def test_cheap_objective_that_fails_does_not_hide_the_architecture():
    """It becomes a trial that fails with the reason."""

    def fragile(point):
        raise ValueError("no count")

    evaluator = Evaluator(Goals.of([total], [Custom(fragile, cheap=True, max=1)]))
    assert not evaluator.is_excluded(Point((1,)))
    assert evaluator(Job(0, Point((1,)))).reason == "ValueError: no count"


def test_values_known_before_a_failure_are_kept():
    """A failed trial still shows what was evaluated first."""

    def fragile(point):
        raise ValueError("late")

    outcome = Evaluator(Goals.of([fragile, Fixed(name="params", source="counted", value=7.0)]))(Job(0, Point((1,))))
    assert outcome.state == "failed"
    assert {name: quantity.value for name, quantity in outcome.quantities.items()} == {"params": 7.0}


def test_quality_takes_unit_and_direction_from_the_task():
    """What better means is the task's to say."""

    class Metric:
        unit = "%"

    class Task:
        metric, direction = Metric(), "max"

    quality = Goals.of(["quality"], task=cast(Any, Task())).objectives[0]
    assert (quality.unit, quality.direction, quality.source) == ("%", "max", "trained")
    with pytest.raises(InputError, match="exactly one limit"):
        Goals.of([Quality(steps=1, tokens=1)], task=cast(Any, Task()))


def test_constraints_of_a_space_become_bounds():
    """What the space's file demands holds in every study over it."""

    @dataclass
    class Constraint:
        metric: str
        minimum: float | None = None
        maximum: float | None = None

    class Space(Grid):
        constraints: tuple[Constraint, ...] = (Constraint("params", maximum=9.0), Constraint("latency_ms", maximum=5.0))

    assert [(item.name, item.bounds) for item in space_constraints(Space())] == [
        ("params", (None, 9.0)),
        ("latency", (None, 5.0)),
    ]
    Space.constraints = (Constraint("latency_ms", minimum=1.0),)
    with pytest.raises(InputError, match="cannot be kept"):
        space_constraints(Space())


def test_missing_target_is_found_before_anything_is_written(tmp_path):
    """A latency on a device that is not here is refused with exit code 3 and leaves no folder."""
    with pytest.raises(TargetUnavailable) as error:
        open_study(Grid(), task="char_lm", target="cuda", objectives=["latency"], storage=tmp_path / "run")
    assert error.value.exit_code == 3
    assert not (tmp_path / "run").exists()
