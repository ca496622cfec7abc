"""Attention of models on NVIDIA GPUs: the entries that artifacts hold, run by the emulation, against float64."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from codegen.gpu.cuda import attention, generators
from codegen.gpu.cuda.sites import Launch
from codegen.kernels.attention import AttentionKernel
from codegen.kernels.base import View, storage_dtype
from codegen.targets.base import Gpu
from codegen.targets.cuda import ARCHITECTURES
from tests.codegen.cuda_emulator import from_bits, run, to_bits

emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed here; the emulation needs it")
GPU = Gpu("cuda", "sm_90", 1024, 48 * 1024, 32)
ROUNDED = 4e-3
"""Half a unit of the last place of bfloat16, 2^-9, of weights, and the same of outputs."""
EXACT = 2e-6
"""Products of 22 bits, the same sums in another order, and exponentials of float32."""

BLOCK = AttentionKernel(1, 40, 40, 2, 1, 32, 32, 32**-0.5, precision="bfloat16", causal=True)
WINDOW = replace(BLOCK, q_len=20, kv_len=150, head_dim=64, value_dim=64, window=40, offset=True)
QKV = AttentionKernel(
    *(2, 70, 70, 4, 2, 16, 16, 0.25),
    precision="bfloat16",
    causal=True,
    q_view=View(128),
    k_view=View(128, 64),
    v_view=View(128, 96),
    out_dtype="bfloat16",
)
STEP = AttentionKernel(2, 1, 200, 4, 2, 32, 32, 32**-0.5, causal=True, offset=True)
BROADCAST = replace(STEP, q_len=4, offset=False, causal=False, bias_shape=(2, 4, 1, 200), out_dtype="bfloat16")


def arrays_of(kernel: AttentionKernel, offset: int) -> list[np.ndarray]:
    """Random operands."""
    rng = np.random.default_rng(4)
    found: list[np.ndarray] = [rng.standard_normal(kind.shape, np.float32) for kind in kernel.inputs]
    if kernel.offset:
        found[3] = np.array(offset, np.int32)
    return found


def run_launches(kernel: AttentionKernel, launches: list[Launch], arrays: list[np.ndarray]) -> np.ndarray:
    """Run entries on operands as a model hands them over; memory that nothing has written is NaN."""
    (kind,) = kernel.outputs
    out = np.full(kind.shape, 0x7FFF if kind.dtype == "bfloat16" else np.nan, storage_dtype(kind.dtype))
    names = [*"qkv", *["offset"] * kernel.offset, *["bias"] * (kernel.bias_shape is not None), "o"]
    named = dict(zip(names, [*arrays, out], strict=True))
    named["parts"] = np.full(attention.few_workspace(kernel).size, np.nan, np.float32)
    for launch in launches:
        run(launch.site, (*launch.grid, 1), *(named[name] for _, name in launch.site.arguments))
    return from_bits(out, "bfloat16") if kind.dtype == "bfloat16" else out


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def rounded_alike(array: np.ndarray) -> np.ndarray:
    """What tensor cores get."""
    return from_bits(to_bits(array, "bfloat16"), "bfloat16")


@emulated
@pytest.mark.parametrize(
    ("kernel", "offset"),
    [
        pytest.param(BLOCK, 0, marks=pytest.mark.slow),
        (replace(QKV, precision="float32", out_dtype="float32"), 0),
        (QKV, 0),
        pytest.param(WINDOW, 77, marks=pytest.mark.slow),
        (replace(BLOCK, causal=False, window=5, alibi_slopes=(0.5, 0.25), q_len=90, kv_len=90), 0),
        pytest.param(
            replace(BLOCK, causal=False, head_dim=128, value_dim=128, bias_shape=(1, 2, 40, 100), kv_len=100),
            0,
            marks=pytest.mark.slow,
        ),
        pytest.param(replace(BLOCK, bias_shape=(1, 1, 1, 40)), 0, marks=pytest.mark.slow),
        pytest.param(replace(WINDOW, precision="float32"), 77, marks=pytest.mark.slow),
        pytest.param(
            replace(WINDOW, precision="float32", causal=False, bias_shape=(1, 2, 20, 1), alibi_slopes=(0.5, 0.1)),
            30,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            replace(BLOCK, precision="float32", head_dim=128, value_dim=128, batch=50), 0, marks=pytest.mark.slow
        ),
        pytest.param(replace(BLOCK, batch=40, heads=4, q_len=130, kv_len=130), 0, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "key", str(value)),
)
def test_attention_of_models_equals_its_meaning(kernel: AttentionKernel, offset: int) -> None:
    """One fused buffer, shared keys, windows, slopes, biases of some axes, a cache; lengths of no whole tiles."""
    assert attention.fits_tensor_cores(kernel, GPU)
    arrays = arrays_of(kernel, offset)
    found = run_launches(kernel, [attention.many_launch(kernel)], arrays)
    if kernel.precision == "float32":
        (expected,) = kernel.reference(*arrays)
        assert error(found, expected) < EXACT
        return
    rounded = [rounded_alike(array) for array in (kernel.scale * arrays[0], *arrays[1:3])]
    (expected,) = replace(kernel, scale=1.0).reference(*rounded, *arrays[3:])
    assert error(found, expected) < ROUNDED


@emulated
@pytest.mark.slow
def test_long_sums_lose_nothing() -> None:
    """Of values of one sign: sums inside of tensor cores, which cut, would be off by 4e-5."""
    kernel = replace(BLOCK, precision="float32", q_len=32, kv_len=4096, heads=1, scale=0.05)
    arrays = arrays_of(kernel, 0)
    arrays[2] = np.abs(arrays[2])
    (expected,) = kernel.reference(*arrays)
    assert error(run_launches(kernel, [attention.many_launch(kernel)], arrays), expected) < EXACT


@emulated
@pytest.mark.parametrize(
    ("kernel", "offset"),
    [
        (STEP, 130),
        (STEP, 0),  # most shares see no key
        (replace(STEP, q_len=3, heads=6, head_dim=48, value_dim=48, window=50, alibi_slopes=(0.5,) * 6), 100),
        pytest.param(replace(STEP, kv_len=40), 39, marks=pytest.mark.slow),  # one share
        pytest.param(BROADCAST, 0, marks=pytest.mark.slow),
        pytest.param(replace(STEP, head_dim=256, value_dim=256, batch=1, heads=20), 199, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "key", str(value)),
)
def test_few_queries_equal_their_meaning(kernel: AttentionKernel, offset: int) -> None:
    """Shares of a cache at several places, one share alone, windows, slopes, biases, heads of several sizes."""
    assert attention.fits_few_queries(kernel)
    arrays = arrays_of(kernel, offset)
    found = run_launches(kernel, attention.few_launches(kernel), arrays)
    (expected,) = kernel.reference(*arrays)
    assert error(found, expected) < (ROUNDED if kernel.out_dtype == "bfloat16" else EXACT)


@pytest.mark.parametrize(
    "kernel",
    [
        replace(BLOCK, normaliser="sigmoid"),
        replace(BLOCK, value_dim=64),
        replace(BLOCK, head_dim=24, value_dim=24),
        replace(BLOCK, head_dim=256, value_dim=256),
        replace(BLOCK, q_view=View(128, 2)),
        replace(BLOCK, k_view=View(130)),
        replace(STEP, normaliser="clipped_softmax"),
        replace(STEP, head_dim=512, value_dim=512),
        replace(STEP, v_view=View(66, 2)),
    ],
    ids=lambda kernel: kernel.key,
)
def test_attention_that_does_not_fit_goes_the_usual_way(kernel: AttentionKernel) -> None:
    """Other normalisers, other or unequal heads, heads that begin elsewhere."""
    assert generators.find(kernel, GPU) is None


def test_blocks_have_the_shared_memory_that_they_ask_for() -> None:
    """The largest heads fit the least that an architecture offers, and the buffers are those of the source."""
    largest = replace(BLOCK, head_dim=128, value_dim=128)
    assert all(attention.fits_tensor_cores(largest, replace(GPU, model=name)) for name in ARCHITECTURES)
    exact = replace(largest, precision="float32", batch=64)
    assert all(attention.fits_tensor_cores(exact, replace(GPU, model=name)) for name in ARCHITECTURES)
    assert attention.many_launch(largest).site.shared_bytes == 2 * 64 * (128 + 8) * 2 + 2 * 64 * 128 * 4
    assert attention.many_launch(exact).site.shared_bytes == 3 * 64 * (128 + 4) * 4


def test_keys_are_shared_out_where_there_are_many() -> None:
    """As many shares as make enough blocks, none of fewer than 64 keys, few where a window hides most keys."""
    one = replace(STEP, batch=1, heads=8, kv_heads=8)
    assert attention.key_shares(replace(one, kv_len=64)) == 1
    assert attention.key_shares(replace(one, kv_len=640)) == 10
    assert attention.key_shares(replace(one, kv_len=1 << 16)) == 33
    assert attention.key_shares(replace(one, kv_len=1 << 16, batch=64)) == 1
    assert attention.key_shares(replace(one, kv_len=1 << 16, window=100)) == 2
