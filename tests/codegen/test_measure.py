"""Latency measurement: statistics, refusals, exclusive use of the device. No claim about any time."""

import json
import multiprocessing
import os
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from codegen import measure
from codegen.measure import Latency, device_lock, measure_latency
from ir.errors import ArtifactError, InputError, KernelCrash, KernelTimeout, MeasurementError, StorageError
from tests.codegen import tiny_artifact


def test_measure_records_figures_and_circumstances(tmp_path: Path):
    """The record has ordered figures, the machine, versions, threads, and survives JSON."""
    path = tiny_artifact.make().save(tmp_path / "tiny.nas")
    latency = measure_latency(path, threads=1, max_seconds=0.5)
    assert 0 < latency.p10_ms <= latency.median_ms <= latency.p90_ms
    assert latency.interval_ms[0] <= latency.median_ms <= latency.interval_ms[1]
    assert latency.repeats >= 20
    assert latency.threads == 1
    assert latency.reference_ms > 0
    assert latency.reference_ratio >= 1
    assert latency.machine["versions"]["tvm"]
    assert Latency.from_dict(json.loads(json.dumps(latency.to_dict()))) == latency


def test_measure_model_with_nan_fails_with_reason(tmp_path: Path):
    """A model that gives NaN has no latency, even if NaN is what it always gave."""
    path = tiny_artifact.make(logarithm=True).save(tmp_path / "nan.nas")
    with pytest.raises(MeasurementError, match=r"output 'sum'(?s:.*)NaN"):
        measure_latency(path, threads=1)


def test_measure_wrong_model_fails_with_reason(tmp_path: Path):
    """A model that fails its self-test is not timed."""
    tiny = tiny_artifact.make()
    wrong = {name: array + np.float32(1) for name, array in tiny.expected_outputs.items()}
    path = tiny_artifact.with_forward(tiny, expected_outputs=wrong).save(tmp_path / "wrong.nas")
    with pytest.raises(ArtifactError, match="self-test"):
        measure_latency(path, threads=1)


def test_measure_crash_fails_with_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Generated code that crashes fails the measurement with the signal's name and leaves the device free."""
    path = tiny_artifact.make().save(tmp_path / "tiny.nas")
    monkeypatch.setattr(measure, "_measure", abort)
    with pytest.raises(KernelCrash, match="SIGABRT"):
        measure_latency(path, threads=1)
    with device_lock("cpu", timeout_s=0):
        pass


def abort(*arguments: object) -> None:
    """Stand in for a measurement whose code crashes."""
    del arguments
    os.abort()


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 10_000}, {"threads": 1, "min_rounds": 3}])
def test_measure_unfit_options_are_refused(tmp_path: Path, options: dict):
    """Options that cannot give a sound figure are bad input, before anything runs."""
    with pytest.raises(InputError):
        measure_latency(tmp_path / "absent.nas", **options)


def hold_device(ready: Event, release: Event) -> None:
    """Hold the lock of a device until told to let go."""
    with device_lock("test-device"):
        ready.set()
        release.wait()


def test_measure_lock_excludes_other_processes():
    """While one process measures, another waits, and gets the device when the first lets go."""
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold_device, args=(ready, release))
    other.start()
    ready.wait()
    with pytest.raises(KernelTimeout, match="holds the device"), device_lock("test-device", timeout_s=0.1):
        pass
    with device_lock("another-device", timeout_s=0):
        pass
    release.set()
    with device_lock("test-device"):
        other.join()


def test_measure_lock_in_unusable_cache_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache folder that cannot be made is named."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="NAS_CACHE_DIR"), device_lock("cpu"):
        pass


@pytest.mark.parametrize("size", [20, 21, 100, 401])
def test_measure_median_interval_covers_the_median(size: int):
    """In 95 % of the draws of a skewed distribution the interval holds the true median."""
    rng = np.random.default_rng(size)
    draws, hits = 2000, 0
    for _ in range(draws):
        low, high = measure.median_interval(rng.exponential(size=size))
        hits += low <= np.log(2) <= high
    # 2000 draws have a standard error of 0.5 %; ranks are whole, so the coverage exceeds 95 % by up to 2 % at n = 20.
    assert 0.93 <= hits / draws <= 0.99


def test_measure_interval_narrows_with_samples():
    """The stopping rule asks for more where samples scatter, and stops where they do not."""
    rng = np.random.default_rng(0)
    scattered = 1 + 0.2 * rng.standard_normal(4000)
    assert not measure.narrow_enough(scattered[:20], 0.02)
    assert measure.narrow_enough(scattered, 0.02)
    assert measure.narrow_enough(np.ones(20), 0.02)


def test_measure_marks_drift_as_noisy():
    """A reference kernel that slows down during the run marks the figures as noisy, a steady one does not."""
    steady = measure._summarize([[1e-3] * 4] * 10, [1e-5] * 40, 0.02, 1, "", 1.0)
    drifting = measure._summarize([[1e-3] * 4] * 10, [1e-5] * 20 + [2e-5] * 20, 0.02, 1, "", 1.0)
    assert (steady.noisy, steady.reference_ratio) == (False, 1.0)
    assert (drifting.noisy, drifting.reference_ratio) == (True, 2.0)


def test_measure_takes_a_round_as_one_sample():
    """Calls of one loading agree with each other more than with those of the next; the interval must not trust them."""
    rounds = [[time, time, time] for time in np.linspace(1e-3, 1.1e-3, 11)]
    latency = measure._summarize(rounds, [1e-5] * 44, 0.02, 1, "", 1.0)
    assert latency.interval_ms == pytest.approx(measure.median_interval(np.linspace(1, 1.1, 11)))
    assert latency.median_ms == pytest.approx(1.05)
    assert (latency.repeats, latency.noisy) == (33, True)


def test_unsettled_names_wide_intervals_and_overlaps_that_are_no_tie():
    """Apart is settled; so is overlapping within half a percent; all else goes on."""
    rng = np.random.default_rng(0)

    def around(median: float, spread: float) -> list[float]:
        return list(median * (1 + spread * rng.standard_normal(40)))

    assert measure.unsettled([around(1.0, 0.01), around(1.1, 0.01)], 0.02) == []
    assert measure.unsettled([around(1.0, 0.01), around(1.0, 0.01), around(1.1, 0.01)], 0.02) == [0, 1]
    assert measure.unsettled([around(1.0, 0.001), around(1.0, 0.001)], 0.02) == []
    assert measure.unsettled([around(1.0, 0.2), around(3.0, 0.001)], 0.02) == [0]


def test_measure_together_gives_each_model_its_record(tmp_path: Path):
    """Records come in the order of the files; equal models get the same rounds or their limit."""
    path = tiny_artifact.make().save(tmp_path / "tiny.nas")
    other = tiny_artifact.make(outputs=1).save(tmp_path / "other.nas")
    records = measure.measure_together([path, other, path], threads=1, max_seconds=0.5)
    assert len(records) == 3
    for latency in records:
        assert latency.interval_ms[0] <= latency.median_ms <= latency.interval_ms[1]
        assert latency.repeats >= 3 * 6
        assert latency.reference_ms == records[0].reference_ms


def test_measure_together_with_one_wrong_model_fails(tmp_path: Path):
    """One that fails its self-test is named, whoever it is measured with."""
    tiny = tiny_artifact.make()
    wrong = {name: array + np.float32(1) for name, array in tiny.expected_outputs.items()}
    paths = [
        tiny.save(tmp_path / "tiny.nas"),
        tiny_artifact.with_forward(tiny, expected_outputs=wrong).save(tmp_path / "wrong.nas"),
    ]
    with pytest.raises(ArtifactError, match=r"wrong\.nas: the self-test"):
        measure.measure_together(paths, threads=1)


def crowded(*arguments: object) -> tuple[list[list[list[float]]], list[float], float]:
    """Stand in for a measurement during which others had the CPU a third of the time."""
    del arguments
    return [[[1e-3] * 3] * 10], [1e-5] * 40, 0.67


def test_measure_on_a_crowded_cpu_is_noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However well the samples agree, a CPU that others use gives no figure to trust."""
    monkeypatch.setattr(measure, "_measure", crowded)
    latency = measure_latency(tmp_path / "any.nas", threads=1)
    assert (latency.noisy, latency.cpu_share) == (True, 0.67)
    older = {name: value for name, value in latency.to_dict().items() if name != "cpu_share"}
    assert Latency.from_dict(older).cpu_share == 1.0
