"""Shipping: winners are compiled with their trained weights, once, and a failure is told."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from safetensors.numpy import save

from ir.errors import CompileError, InputError
from nas.callbacks import Callback
from nas.evaluate import Evaluator
from nas.executors.base import Job
from nas.goals import Goals
from nas.objectives.base import Context
from nas.objectives.quality import WEIGHTS_FILE
from nas.search import load_study, search
from nas.ship import ship
from nas.storages.journal import Journal
from nas.study import Study
from nas.testing.spaces import Grid, Point


@dataclass(frozen=True)
class Artifact:
    """What a compiler would return."""

    weights: Any
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"weights": float(self.weights["w"][0]), "metadata": self.metadata}))


@pytest.fixture
def compiled(monkeypatch):
    """Replace the compiler and the stopwatch; give the graphs that were compiled."""
    graphs = []

    def compile_graph(graph, params, target, *, opt_level, tuning_trials):
        if graph == "broken":
            raise CompileError("no kernel")
        graphs.append(graph)
        return Artifact(params)

    def record_latency(path, latency):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"latency": latency}))

    measured = SimpleNamespace(to_dict=lambda: {"median_ms": 1.5})
    fakes = {
        "codegen.compile": SimpleNamespace(compile_graph=compile_graph),
        "codegen.measure": SimpleNamespace(measure_latency=lambda path, threads: measured),
        "codegen.artifact": SimpleNamespace(record_latency=record_latency),
    }
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, cast(Any, module))
    here = SimpleNamespace(name="here", architecture=platform.machine(), gpu=None)
    monkeypatch.setattr(Context, "resolve_target", lambda self: here)
    monkeypatch.setattr(Context, "graph", lambda self, objective, **options: _graph_of(self.architecture))
    return graphs


def _graph_of(point):
    return "broken" if point == Point((1, 3)) else f"graph of {point.choices}"


def loss(point):
    return float(point.choices[0])


def cost(point):
    return float(4 - point.choices[1] - point.choices[0])


def finished_study(folder):
    study = Study(Grid((2, 4)), Evaluator(Goals.of([loss, cost])), storage=Journal(folder))
    while trial := study.ask():
        outcome = study.evaluator(Job(trial.number, trial.architecture))
        weights = save({"w": np.array([trial.number], dtype=np.float32)})
        study.tell(trial.number, replace(outcome, files={WEIGHTS_FILE: weights}))
    return study


def test_ship_compiles_the_front_with_trained_weights_once(tmp_path, compiled):
    """Every front point gets a measured file with its own weights; a second call compiles nothing."""
    notices = []

    class Listener(Callback):
        def on_notice(self, message):
            notices.append(message)

    with finished_study(tmp_path) as study:
        front = study.pareto_front()
        assert [trial.architecture.choices for trial in front] == [(0, 3), (1, 3)]
        shipped = ship(study, callback=Listener())
        assert list(shipped) == [front[0].number]
        assert "no kernel" in notices[0]
        content = json.loads(shipped[front[0].number].read_text())
        assert content["weights"] == front[0].number
        assert content["latency"] == {"median_ms": 1.5}
        assert content["metadata"]["hash"] == front[0].hash
        assert ship(study) == shipped
        assert len(compiled) == 1
    artifacts = [trial.artifact for trial in load_study(tmp_path).pareto_front()]
    assert artifacts == [f"artifacts/trial_{front[0].number}.nas", None]


def test_ship_for_another_processor_measures_nothing(tmp_path, compiled, monkeypatch):
    """The file is there, without a latency that no machine has measured."""
    elsewhere = SimpleNamespace(name="there", architecture="elsewhere", gpu=None)
    monkeypatch.setattr(Context, "resolve_target", lambda self: elsewhere)
    with finished_study(tmp_path) as study:
        [path] = ship(study).values()
        assert "latency" not in json.loads(path.read_text())
    assert len(compiled) == 1


def test_ship_needs_a_run_folder():
    """A study in memory has no place for artifacts."""
    study = search(Grid((2,)), objectives=[loss], budget=1)
    with pytest.raises(InputError, match="run folder"):
        ship(study)
