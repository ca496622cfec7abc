"""Packed products in bfloat16: odd shapes, epilogues, storage and instruction sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen import _tvm
from codegen.kernels.base import AVX2, AVX512, View
from codegen.kernels.gemm import GemmKernel
from ir.rounding import bfloat16_bits, from_bfloat16_bits, round_to_bfloat16
from tests.codegen.kernels import checking

PRODUCT_TOLERANCE = 2e-2  # of the output's scale: each operand is off by up to 2^-9, and errors of a sum partly cancel
CASES = (checking.NATIVE, "avx512", "avx2", "sse")


def product(m: int, n: int, k: int, **fields: object) -> GemmKernel:
    """A product in bfloat16."""
    return GemmKernel(m, n, k, precision="bfloat16", **fields)  # type: ignore[arg-type]


GEMMS = {
    "one": product(1, 1, 1),
    "vector_times_matrix": product(1, 200, 65, bias=True),
    "one_panel_short": product(3, 17, 9),
    "exact_tiles": product(16, 96, 32),
    "tails_everywhere": product(37, 101, 33, bias=True, residual=True),
    "scaled": product(7, 20, 33, bias=True, scale=0.3, activation="silu", residual=True),
    "gated": product(13, 50, 33, bias=True, gate="silu", residual=True),
    "gated_one_row": product(1, 37, 20, gate="gelu"),
    "long_k": product(5, 20, 9001, bias=True, residual=True),
    "window_of_a_wider_buffer": product(40, 70, 45, a_view=View(101, 13)),
    "competing_rows": product(20, 17, 2048),
    "reads_pairs": product(19, 50, 34, a_dtype="bfloat16", bias=True, activation="gelu"),
    "reads_competing_pairs": product(20, 17, 2048, a_dtype="bfloat16"),
    "writes_pairs": product(21, 51, 33, out_dtype="bfloat16", bias=True, activation="gelu"),
    "reads_and_writes_pairs": product(21, 37, 66, a_dtype="bfloat16", out_dtype="bfloat16", gate="silu", residual=True),
    "float32_writes_bfloat16": GemmKernel(21, 51, 33, out_dtype="bfloat16"),
    "one_row_of_pairs": product(1, 70, 66, a_dtype="bfloat16", out_dtype="bfloat16"),
}


def _check_against_unrounded(kernel: GemmKernel, isa: str) -> None:
    """Hold a product against that of the operands before they were rounded."""
    arrays = checking.random_inputs(replace(kernel, a_dtype="float32"))
    (expected,) = replace(kernel, precision="float32", a_dtype="float32").reference(*arrays)
    if kernel.a_dtype == "bfloat16":
        arrays[0] = bfloat16_bits(arrays[0])
    (actual,) = checking.run(kernel, arrays, checking.target_of(isa))
    assert checking.relative_error(actual, expected) <= PRODUCT_TOLERANCE, kernel.key


@pytest.mark.parametrize("isa", CASES)
@pytest.mark.parametrize("case", GEMMS)
def test_gemm_equals_the_product_of_rounded_operands(case: str, isa: str) -> None:
    """Rounding the operands is all that is lost: sums are as exact as in float32, whatever computes them."""
    checking.check(GEMMS[case], isa)


@pytest.mark.parametrize("case", ["tails_everywhere", "gated", "long_k", "reads_and_writes_pairs"])
def test_gemm_stays_near_the_product_of_operands(case: str) -> None:
    """Operands rounded to 8 bits change the result by at most 2 % of its scale."""
    _check_against_unrounded(GEMMS[case], "avx512")


@given(
    m=st.integers(1, 70),
    n=st.integers(1, 150),
    k=st.integers(1, 90),
    bias=st.booleans(),
    residual=st.booleans(),
    stored=st.tuples(st.booleans(), st.booleans()),
    finish=st.sampled_from([(None, None), ("gelu", None), (None, "silu")]),
    isa=st.sampled_from(CASES),
)
@settings(max_examples=12)
def test_gemm_holds_for_random_shapes(
    m: int,
    n: int,
    k: int,
    bias: bool,
    residual: bool,
    stored: tuple[bool, bool],
    finish: tuple[str | None, str | None],
    isa: str,
) -> None:
    """Any shape, epilogue and storage stays within 2 % of the exact product's scale."""
    a_dtype, out_dtype = ("bfloat16" if flag else "float32" for flag in stored)
    kernel = product(
        m,
        n,
        k + k % 2 if stored[0] else k,
        bias=bias,
        residual=residual,
        activation=finish[0],
        gate=finish[1],
        a_dtype=a_dtype,
        out_dtype=out_dtype,
    )
    _check_against_unrounded(kernel, isa)


@pytest.mark.parametrize("kernel", [product(29, 75, 40, bias=True, gate="silu"), product(19, 40, 8195)])
def test_every_knob_computes_the_same(kernel: GemmKernel) -> None:
    """No candidate that tuning may choose changes the result, and none runs seven half products."""
    isa = checking.target_of("avx2").isa
    space = kernel.knob_space(isa)
    assert space[0] == kernel.knobs(isa)
    assert len(space) > 1
    assert not any(knobs["strassen"] for knobs in space)
    for knobs in space[:6]:
        checking.check(kernel, "avx2", knobs=knobs)


def test_packing_rounds_and_pairs_neighbours_of_k() -> None:
    """Word (panel, pair, column) holds rows 2 pair and 2 pair + 1 of the weight; an odd K ends with a zero."""
    kernel = product(4, 50, 7)
    knobs = kernel.knobs(AVX512)
    weight = np.random.default_rng(0).standard_normal((7, 50)).astype(np.float32)
    packed = kernel.pack(1, weight, AVX512, knobs)
    assert packed is not None
    assert (packed.shape, packed.dtype.name) == (kernel.packed_shape(1, AVX512, knobs), kernel.packed_dtype(1))
    halves = packed.view(np.uint16).reshape(*packed.shape, 2)  # panel, pair, column, half
    back = from_bfloat16_bits(halves).transpose(1, 3, 0, 2).reshape(8, -1)[:, :50]
    np.testing.assert_array_equal(back, np.vstack([round_to_bfloat16(weight), np.zeros((1, 50))]))


def test_machine_code_has_the_instruction_only_where_it_exists() -> None:
    """The native product is made of pair products; a portable level never sees the instruction."""
    kernel = product(16, 32, 32, out_dtype="bfloat16")
    for case, expected in ((checking.NATIVE, True), ("avx512", False), ("avx2", False)):
        target = checking.target_of(case)
        function = kernel.build(target.isa, kernel.knobs(target.isa))
        library = _tvm.compile_functions({"main": function}, _tvm.Target(target.to_tvm()))
        assembly = library.mod.inspect_source("asm")
        assert ("vdpbf16ps" in assembly) is expected
        assert ("vcvtneps2bf16" in assembly) is expected


def test_key_names_the_storage() -> None:
    """Precision and storage are part of the workload; their defaults are left out."""
    kernel = product(8, 16, 32, a_dtype="bfloat16", out_dtype="bfloat16")
    assert kernel.key == "gemm(m=8,n=16,k=32,precision=bfloat16,a_dtype=bfloat16,out_dtype=bfloat16)"
    assert kernel.inputs[0].size_bytes == 8 * 32 * 2
    assert len({kernel.key for kernel in GEMMS.values()}) == len(GEMMS)


def test_storage_that_cannot_be_read_is_refused() -> None:
    """Pairs need an even k, whole rows and a product in bfloat16."""
    with pytest.raises(ValueError, match="even"):
        product(1, 1, 3, a_dtype="bfloat16")
    with pytest.raises(ValueError, match="window"):
        product(1, 1, 4, a_dtype="bfloat16", a_view=View(8))
    with pytest.raises(ValueError, match="float32"):
        GemmKernel(1, 1, 4, a_dtype="bfloat16")
    assert product(4, 4, 4).knobs(AVX2)["strassen"] is False
