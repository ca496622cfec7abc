"""Seven half products instead of eight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.base import AVX512, Knobs, View
from codegen.kernels.emit import Vectors
from codegen.kernels.gemm import GemmKernel
from codegen.kernels.strassen import PRODUCTS, StrassenLoops, pack
from tests.codegen.kernels import checking


def _knobs(kernel: GemmKernel, rows: int, vectors: int, chunks: int) -> dict[str, int | str | bool]:
    knobs = dict(kernel.knobs(checking.target_of("avx2").isa))
    return knobs | {
        "rows": rows,
        "vectors": vectors,
        "chunks": chunks,
        "order": "panels",
        "strassen": True,
        "groups": 2,
    }


def test_products_multiply_two_by_two_matrices_of_symbols() -> None:
    """The seven products give every a_ik b_kj of C_ij once and nothing else."""
    found = np.zeros((2, 2, 2, 2, 2, 2), int)  # C row, C column, A row, A column, weight row, weight column
    for product in PRODUCTS:
        for c in product.c:
            for a in product.a:
                for w in product.weight:
                    found[c.row, c.column, a.row, a.column, w.row, w.column] += c.sign * a.sign * w.sign
    eye = np.eye(2, dtype=int)
    expected = np.einsum("ri,cj,ab->rciabj", eye, eye, eye)
    assert np.array_equal(found, expected)


def test_pack_sums_quadrants_and_pads_odd_sizes_with_zeros() -> None:
    """Product 0 reads W00 + W11, whose missing row and panel count as zero."""
    weight = np.arange(3 * 5 * 2, dtype=np.float64).reshape(3, 5, 2)  # three panels, K 5, W 2
    packed = pack(weight)
    assert packed.shape == (2, 7, 3, 2)
    assert np.array_equal(packed[0, 0], weight[0, :3] + np.pad(weight[1, 3:], ((0, 1), (0, 0))))
    assert np.array_equal(packed[1, 0], weight[2, :3])


CASES = {
    "even": GemmKernel(32, 64, 48),
    "odd_everywhere": GemmKernel(33, 51, 35, bias=True),
    "one_panel": GemmKernel(21, 5, 70, bias=True, residual=True),
    "three_panels": GemmKernel(20, 45, 64, activation="gelu"),
    "one_row_more_than_two_chunks": GemmKernel(1025, 17, 66, bias=True),
    "gated": GemmKernel(27, 50, 65, bias=True, gate="silu", residual=True),
    "scaled": GemmKernel(18, 30, 64, bias=True, scale=0.3),
    "window_of_a_wider_buffer": GemmKernel(40, 70, 45, a_view=View(100, 13)),
    "rows_of_a_page": GemmKernel(16, 16, 2048),
}


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("case", CASES)
def test_strassen_equals_reference(case: str, isa: str) -> None:
    """Halves of any length, epilogues and windows give the float64 product."""
    for rows, vectors, chunks in ((4, 2, 1), (3, 2, 3)):
        checking.check(CASES[case], isa, knobs=_knobs(CASES[case], rows, vectors, chunks))


@given(m=st.integers(1, 60), n=st.integers(1, 120), k=st.integers(1, 90), chunks=st.integers(1, 4), gated=st.booleans())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_strassen_equals_reference_for_any_size(m: int, n: int, k: int, chunks: int, gated: bool) -> None:
    """Whatever is odd or smaller than a tile is padded and left out of the result."""
    kernel = GemmKernel(m, n, k, bias=True, gate="relu" if gated else None)
    checking.check(kernel, "avx2", knobs=_knobs(kernel, 4, 2, chunks))


def test_rule_takes_seven_products_only_where_they_save_time() -> None:
    """Large products are worth the additions; single rows and small ones are not."""
    assert GemmKernel(128, 3072, 768).knobs(AVX512)["strassen"]
    assert GemmKernel(197, 192, 192).knobs(AVX512)["strassen"]
    assert not GemmKernel(1, 3072, 768).knobs(AVX512)["strassen"]
    assert not GemmKernel(64, 64, 64).knobs(AVX512)["strassen"]


def test_estimate_counts_seven_eighths_of_a_large_product() -> None:
    """Sums and updates vanish beside the products as all sizes grow."""
    loops = StrassenLoops(Vectors(16), m=512, k=8192, panels=128, vectors=2, rows=14, chunks=1, groups=1)
    full = 512 * 8192 * 128 * 2
    assert 7 / 8 < loops.cycles(threads=1) / full < 1.06 * 7 / 8


def test_error_is_relative_to_the_larger_row_and_can_be_avoided() -> None:
    """A row of small numbers loses digits beside one of large numbers; without the algorithm it keeps them."""
    kernel = GemmKernel(32, 64, 128)
    target = checking.target_of("avx2", threads=1)
    rng = np.random.default_rng(0)
    a, w = (rng.standard_normal(operand.shape).astype(np.float32) for operand in kernel.inputs)
    a[16:] *= 1e4  # partners of rows 0 to 15
    (expected,) = kernel.reference(a, w)

    def error(knobs: Knobs) -> float:
        (found,) = checking.run(kernel, [a, w], target, knobs)
        return float(np.abs(found[:16] - expected[:16]).max() / np.abs(expected[:16]).max())

    assert error(_knobs(kernel, 4, 2, 1) | {"groups": 1}) > 1e-5
    plain = target.without_strassen()
    assert not any(knobs["strassen"] for knobs in kernel.knob_space(plain.isa))
    assert error(kernel.knobs(plain.isa)) < 1e-6
    assert plain.fingerprint != target.fingerprint
