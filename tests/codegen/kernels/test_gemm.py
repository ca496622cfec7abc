"""Packed and batched products over odd shapes, epilogues, knobs and instruction sets."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels import emit
from codegen.kernels.base import AVX2, AVX512, NEON, SSE, Isa, View
from codegen.kernels.batch_gemm import BatchGemmKernel
from codegen.kernels.emit import ELEMENT_BYTES, LINE_BYTES, BlockPrefetch
from codegen.kernels.gemm import GemmKernel
from codegen.kernels.vector_math import ACTIVATIONS
from tests.codegen.kernels import checking

LINE = LINE_BYTES // ELEMENT_BYTES

GEMMS = {
    "one": GemmKernel(1, 1, 1),
    "vector_times_matrix": GemmKernel(1, 200, 65, bias=True),
    "one_panel_short": GemmKernel(3, 17, 9),
    "exact_tiles": GemmKernel(16, 96, 32),
    "tails_everywhere": GemmKernel(37, 101, 33, bias=True, residual=True),
    "scaled": GemmKernel(7, 20, 33, bias=True, scale=0.3, activation="silu", residual=True),
    "gated": GemmKernel(13, 50, 33, bias=True, gate="silu", residual=True),
    "gated_one_row": GemmKernel(1, 37, 20, gate="gelu"),
    "long_k": GemmKernel(7, 20, 5000, bias=True, residual=True),
    "long_k_gated": GemmKernel(10, 70, 4500, bias=True, gate="silu"),
    "window_of_a_wider_buffer": GemmKernel(40, 70, 45, a_view=View(100, 13)),
}

BATCHES = {
    "plain": BatchGemmKernel(3, 5, 7, 9),
    "transposed_b": BatchGemmKernel(2, 13, 50, 33, transpose_b=True),
    "transposed_a": BatchGemmKernel(2, 33, 20, 5, transpose_a=True),
    "both": BatchGemmKernel(1, 40, 49, 17, transpose_a=True, transpose_b=True, scale=0.5),
    "shared_a": BatchGemmKernel(4, 20, 16, 16, a_shared=True),
    "shared_b": BatchGemmKernel(4, 9, 3, 40, b_shared=True, transpose_b=True),
    "one_row": BatchGemmKernel(3, 1, 70, 20),
    "rounded": BatchGemmKernel(2, 19, 20, 7, precision="bfloat16"),
    "rounded_transposed": BatchGemmKernel(2, 5, 37, 18, transpose_a=True, transpose_b=True, precision="bfloat16"),
}


@pytest.mark.parametrize("isa", checking.ISAS)
@pytest.mark.parametrize("case", GEMMS)
def test_gemm_equals_reference(case: str, isa: str) -> None:
    """Any number of rows, columns and depth gives the float64 product, epilogue included."""
    checking.check(GEMMS[case], isa)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gemm_applies_activation(activation: str) -> None:
    """Every activation is applied after the bias."""
    checking.check(GemmKernel(5, 21, 18, bias=True, activation=activation), "avx2")


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("isa", checking.ISAS)
def test_batch_gemm_equals_reference(case: str, isa: str) -> None:
    """Both operands may be transposed or shared."""
    checking.check(BATCHES[case], isa)


@pytest.mark.parametrize(
    "kernel",
    [GemmKernel(29, 75, 40, bias=True, gate="silu"), GemmKernel(19, 40, 4097), BatchGemmKernel(2, 21, 50, 8)],
    ids=lambda kernel: kernel.key,
)
def test_every_knob_computes_the_same(kernel: GemmKernel | BatchGemmKernel) -> None:
    """No candidate that tuning may choose changes the result, and the rule's choice comes first."""
    isa = checking.target_of("avx2").isa
    space = kernel.knob_space(isa)
    assert space[0] == kernel.knobs(isa)
    assert len(space) > 2
    for knobs in space[:8]:
        checking.check(kernel, "avx2", knobs=knobs)


@given(
    m=st.integers(1, 70),
    n=st.integers(1, 150),
    k=st.integers(1, 90),
    bias=st.booleans(),
    residual=st.booleans(),
    finish=st.sampled_from([(None, None), ("gelu", None), (None, "silu")]),
    isa=st.sampled_from(checking.ISAS),
)
@settings(max_examples=12)
def test_gemm_holds_for_random_shapes(
    m: int, n: int, k: int, bias: bool, residual: bool, finish: tuple[str | None, str | None], isa: str
) -> None:
    """The float32 error stays within 1e-5 of the output's scale for any shape."""
    checking.check(GemmKernel(m, n, k, bias=bias, residual=residual, activation=finish[0], gate=finish[1]), isa)


@pytest.mark.parametrize("isa", [AVX512, AVX2, SSE, NEON], ids=lambda isa: isa.name)
@pytest.mark.parametrize("kernel", GEMMS.values(), ids=GEMMS)
def test_tile_fits_the_registers(kernel: GemmKernel, isa: Isa) -> None:
    """Accumulators, weights and a broadcast never need more registers than there are."""
    for knobs in kernel.knob_space(isa):
        rows, vectors = int(knobs["rows"]), int(knobs["vectors"])
        assert rows * vectors + vectors + 1 <= isa.registers


def test_packing_is_lossless() -> None:
    """The packed weight holds every element once, the rest of it zeros."""
    kernel = GemmKernel(4, 50, 6, gate="silu")
    knobs = kernel.knobs(AVX2)
    weight = np.arange(1, 601, dtype=np.float32).reshape(6, 100)
    packed = kernel.pack(1, weight, AVX2, knobs)
    assert packed is not None
    assert packed.shape == kernel.packed_shape(1, AVX2, knobs)
    assert sorted(packed[packed != 0].tolist()) == weight.ravel().tolist()


def test_key_names_the_workload() -> None:
    """Equal kernels share a key, different ones do not, and defaults are left out."""
    assert GemmKernel(128, 768, 64, bias=True, activation="gelu").key == "gemm(m=128,n=768,k=64,bias,activation=gelu)"
    assert GemmKernel(1, 2, 3, a_view=View(9, 4)).key == "gemm(m=1,n=2,k=3,a_view=9+4)"
    assert len({kernel.key for kernel in GEMMS.values()}) == len(GEMMS)


def test_gate_and_activation_exclude_each_other() -> None:
    """A gated product names its activation once."""
    with pytest.raises(ValueError, match="gate"):
        GemmKernel(1, 1, 1, activation="relu", gate="silu")


@given(st.integers(1, 40), st.integers(1, 60), st.integers(2, 13))
@settings(max_examples=40, deadline=None)
def test_tiles_of_a_panel_fetch_the_whole_next_one(rows: int, vectors: int, tiles: int) -> None:
    """Every line of the next panel is asked for once the last tile is done, wherever lines begin."""
    width, fetched = vectors * 8, set[int]()

    def prefetch(_buffer: object, panel: int, row: int, column: int) -> None:
        fetched.add((panel * rows * width + row * width + column) // LINE)

    buffer = SimpleNamespace(shape=(3, rows, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emit, "prefetch", prefetch)
        for tile, row in itertools.product(range(tiles), range(rows)):
            BlockPrefetch(buffer, tiles).fetch_next(tile, 1, row)  # pyright: ignore[reportArgumentType]
    assert fetched >= set(range(2 * rows * width // LINE, (3 * rows * width - 1) // LINE))


def test_panel_with_one_tile_is_left_to_the_processor() -> None:
    """What is read once from end to end is seen coming."""
    BlockPrefetch(SimpleNamespace(shape=(3, 4, 16)), 1).fetch_next(0, 1, 2)  # pyright: ignore[reportArgumentType]  # writes nothing
