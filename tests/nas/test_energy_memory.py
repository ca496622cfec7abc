"""Energy and memory as objectives."""

from __future__ import annotations

from pathlib import Path

import pytest

import nas
from codegen import energy
from codegen.energy import Energy as Record
from ir.errors import TargetUnavailable
from nas.objectives.base import Context
from nas.objectives.energy import Energy
from nas.objectives.latency import Latency
from nas.objectives.memory_bytes import MemoryBytes


@pytest.fixture
def context():
    return Context(nas.load_space("tiny_lm").smallest(), nas.get_task("char_lm", seq_len=32), threads=1)


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Let the compiler write a file, and give the energy of what it wrote; the list tells what was asked."""
    asked: list[tuple[str, int | None]] = []

    def compile_to(self, context, folder):
        path = folder / f"batch_{self.batch}.nas"
        path.write_text("model")
        return path

    def measure(path, *, threads):
        asked.append((Path(path).name, threads))
        return Record(0.25, (0.24, 0.27), 60, 6, 3.0, 1, ("package-0",), "this one")

    monkeypatch.setattr(Latency, "compile", compile_to)
    monkeypatch.setattr(energy, "measure_energy", measure)
    return asked


def test_energy_is_marked_as_measured_with_its_interval(counted, context):
    """What counted it, and the idle power within, stay with the value."""
    found = Energy(batch=4).evaluate(context)
    assert (found.value, found.unit, found.source, found.interval) == (0.25, "J", "measured", (0.24, 0.27))
    assert found.details["counters"] == ("package-0",)
    assert found.details["idle_w"] == 3.0
    assert counted == [("batch_4.nas", 1)]


def test_a_search_for_energy_is_refused_where_nothing_counts_it(monkeypatch, tmp_path):
    """Before a folder is made."""

    def missing(root=None):
        raise TargetUnavailable("energy cannot be measured here")

    monkeypatch.setattr(energy, "find_counters", missing)
    with pytest.raises(TargetUnavailable, match="cannot be measured here"):
        nas.open_study("tiny_lm", objectives=["params", "energy"], storage=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_memory_is_parameters_and_the_plan_of_activations(context):
    """Parameters are the same for every batch; activations grow with it."""
    one, four = MemoryBytes().evaluate(context), MemoryBytes(batch=4).evaluate(context)
    for found in (one, four):
        assert found.value == found.details["param_bytes"] + found.details["activation_bytes"]
        assert found.details["peak_activation_bytes"] <= found.details["activation_bytes"]
    assert one.details["param_bytes"] == four.details["param_bytes"] >= 4 * nas.Params().evaluate(context).value
    assert 3 < four.details["activation_bytes"] / one.details["activation_bytes"] < 5
    assert (one.source, one.unit) == ("counted", "bytes")
