"""Recurrences of models on NVIDIA GPUs: the entries that artifacts hold, run by the emulation, against float64."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from codegen.gpu.cuda import generators, recurrences
from codegen.kernels.base import Kernel, View
from codegen.kernels.delta_scan import DeltaScanKernel
from codegen.kernels.recurrence import OuterScanKernel
from codegen.targets.base import Gpu
from tests.codegen.cuda_emulator import run

emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed here; the emulation needs it")
GPU = Gpu("cuda", "sm_90", 1024, 48 * 1024, 32)
EXACT = 3e-6
"""Products of 22 bits and sums of float32; numbers of 11 bits alone are off by 5e-4."""
OF_DECAYS = 1e-6
"""For each unit of decay: 2^-24 of the sum over 16 tokens, in the exponent."""

FUSED = OuterScanKernel(
    *(2, 70, 2, 16, 32, "key", 0.25, None, True, True), q_view=View(144), k_view=View(144, 32), v_view=View(144, 64)
)
HEADS = OuterScanKernel(1, 130, 3, 32, 48, decay="head", initial_state=True, final_state=True)
FIXED = OuterScanKernel(1, 40, 2, 16, 16, decay="head", constant_log_decay=(-0.1, -3.0))


def check(kernel: OuterScanKernel, strength: float) -> None:
    """Run the entries on random operands; memory that nothing has written is NaN."""
    rng = np.random.default_rng(5)
    arrays = [rng.standard_normal(kind.shape, np.float32) for kind in kernel.inputs]
    if kernel.has_gate:
        arrays[3] = (-strength * rng.random(arrays[3].shape)).astype(np.float32)
    outs = [np.full(kind.shape, np.nan, np.float32) for kind in kernel.outputs]
    names = [*"qkv", *["g"] * kernel.has_gate, *["first"] * kernel.initial_state, "o", "last"]
    named = dict(zip(names, [*arrays, *outs], strict=False))
    named["work"] = np.full(recurrences.workspace(kernel).size, np.nan, np.float32)
    for launch in recurrences.launches(kernel):
        run(launch.site, (*launch.grid, 1), *(named[name] for _, name in launch.site.arguments))
    for found, expected in zip(outs, kernel.reference(*arrays), strict=True):
        assert np.isfinite(found).all()
        assert np.abs(found - expected).max() < (EXACT + OF_DECAYS * strength) * np.abs(expected).max()


@emulated
@pytest.mark.parametrize(
    ("kernel", "strength"),
    [
        (FUSED, 0.1),
        (FUSED, 30.0),  # exp(-b) of a chunk would be exp(1900)
        pytest.param(HEADS, 0.1, marks=pytest.mark.slow),
        pytest.param(replace(FUSED, initial_state=False, final_state=False), 1.0, marks=pytest.mark.slow),
        pytest.param(FIXED, 0.0, marks=pytest.mark.slow),
        pytest.param(replace(HEADS, decay="none"), 0.0, marks=pytest.mark.slow),
        pytest.param(OuterScanKernel(1, 200, 1, 64, 128, decay="key", final_state=True), 0.5, marks=pytest.mark.slow),
        pytest.param(OuterScanKernel(2, 64, 2, 128, 64, decay="key", initial_state=True), 0.5, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "key", str(value)),
)
def test_recurrences_of_models_equal_their_meaning(kernel: OuterScanKernel, strength: float) -> None:
    """One fused buffer, decays of features, of heads, fixed and none; states that come in and go out; ragged ends."""
    assert recurrences.fits(kernel, GPU)
    check(kernel, strength)


@pytest.mark.parametrize(
    "kernel",
    [
        replace(FUSED, t=31),
        replace(FUSED, dk=24),
        replace(FUSED, dv=24),
        replace(FUSED, dk=144),
        replace(FUSED, v_view=View(144, 66)),
        replace(FUSED, q_view=View(146)),
        replace(FUSED, batch=64, heads=16, t=1 << 14),  # more than 512 MB between the launches
        DeltaScanKernel(1, 64, 2, 16, 16),
    ],
    ids=lambda kernel: kernel.key,
)
def test_recurrences_that_do_not_fit_go_the_usual_way(kernel: Kernel) -> None:
    """Few tokens, other heads, operands that begin elsewhere, too much memory, other rules."""
    assert generators.find(kernel, GPU) is None


def test_blocks_have_the_shared_memory_that_they_ask_for() -> None:
    """Decays of large heads fit server GPUs only."""
    large = OuterScanKernel(1, 64, 2, 128, 128, decay="key")
    assert recurrences.fits(large, GPU)
    assert recurrences.fits(large, replace(GPU, model="sm_80"))
    assert not recurrences.fits(large, replace(GPU, model="sm_86"))
    assert recurrences.fits(replace(large, decay="head"), replace(GPU, model="sm_86"))


def test_one_launch_is_enough_where_no_state_is_needed() -> None:
    """A single chunk that starts from zero."""
    assert [len(recurrences.launches(kernel)) for kernel in (FIXED, FUSED, HEADS)] == [1, 3, 3]
    assert len(recurrences.launches(replace(FIXED, final_state=True))) == 3
