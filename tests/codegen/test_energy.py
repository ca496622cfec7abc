"""Counters of energy, with a folder in place of the kernel's. No claim about any joule of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from codegen import energy
from codegen.energy import find_counters, measure_energy, take_rounds, used_j
from ir.errors import MeasurementError, TargetUnavailable
from tests.codegen import tiny_artifact

SPAN_UJ = 1_000_000


def add(root: Path, folder: str, name: str, energy_uj: int = 0) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{SPAN_UJ}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    return path / "energy_uj"


def spend(counter: Path, joules: float) -> None:
    counter.write_text(str((int(counter.read_text()) + round(joules * 1e6)) % (SPAN_UJ + 1)))


def test_packages_and_their_memory_are_counted_once(tmp_path):
    """Cores are part of a package, the platform holds it, and a second driver shows it again."""
    for folder, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    ):
        add(tmp_path, folder, name)
    (tmp_path / "intel-rapl:9").mkdir()  # a zone without a counter
    assert [counter.name for counter in find_counters(tmp_path)] == ["package-0", "dram", "package-1"]


def test_energy_of_a_call_is_the_sum_of_all_counters_across_their_end(tmp_path):
    """A counter that begins anew has counted its span and one."""
    one = add(tmp_path, "intel-rapl:0", "package-0", SPAN_UJ - 100_000)
    other = add(tmp_path, "intel-rapl:1", "package-1", 5)
    counters = find_counters(tmp_path)

    def call():
        spend(one, 0.3)
        spend(other, 0.2)

    assert used_j(counters, call) == pytest.approx(0.5)
    assert int(one.read_text()) < 300_000


def test_rounds_give_joules_a_call(tmp_path):
    """Six rounds at least, whatever the time; each is divided by its calls."""
    counter = add(tmp_path, "intel-rapl:0", "package-0")
    rounds, calls = take_rounds(find_counters(tmp_path), lambda: spend(counter, 0.01), 4, 0.0)
    assert rounds == pytest.approx([0.01] * 6)
    assert calls == 24


def test_counters_that_stand_still_give_no_figure(tmp_path):
    """A virtual machine may show counters that never move."""
    add(tmp_path, "intel-rapl:0", "package-0")
    with pytest.raises(MeasurementError, match="stand still"):
        take_rounds(find_counters(tmp_path), lambda: None, 1, 0.0)


def test_a_machine_without_counters_is_refused(tmp_path):
    """No folder, and a folder of other things, say what is missing."""
    with pytest.raises(TargetUnavailable, match="cannot be measured here"):
        find_counters(tmp_path / "none")
    add(tmp_path, "intel-rapl:0", "psys")
    with pytest.raises(TargetUnavailable, match="RAPL"):
        find_counters(tmp_path)


def test_a_closed_counter_is_refused_with_the_way_to_open_it(tmp_path, monkeypatch):
    """Kernels let only the administrator read them."""
    path = add(tmp_path, "intel-rapl:0", "package-0")
    monkeypatch.setattr(energy.os, "access", lambda *_: False)
    with pytest.raises(TargetUnavailable, match="may not read") as caught:
        find_counters(tmp_path)
    assert str(path) in str(caught.value)


def test_a_model_is_run_in_a_process_of_its_own_until_its_counters_are_judged(tmp_path):
    """A counter that nothing moves is found out only after loading, self-test and rounds, and the reason comes back."""
    add(tmp_path / "powercap", "intel-rapl:0", "package-0")
    path = tiny_artifact.make().save(tmp_path / "tiny.nas")
    with pytest.raises(MeasurementError, match="stand still"):
        measure_energy(path, threads=1, seconds=0.1, root=tmp_path / "powercap")
