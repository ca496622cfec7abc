"""Selection and sorting of rows: sizes around vectors and powers of two, ties, infinities, both methods."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.topk import TopKKernel
from tests.codegen.kernels import checking

SHAPES = (
    (1, 1, 1),
    (3, 2, 2),
    (5, 7, 3),
    (2, 8, 8),
    (4, 16, 1),
    (3, 33, 4),
    (2, 100, 100),
    (1, 257, 20),
    (2, 64, 6),
    (2, 700, 9),
)


def assert_exact(kernel: TopKKernel, x: np.ndarray, isa: str, method: str) -> None:
    """Values and positions are those of a stable sort, exactly."""
    found = checking.run(kernel, [x], checking.target_of(isa), {"method": method})
    for got, wanted in zip(found, kernel.reference(x), strict=True):
        np.testing.assert_array_equal(got, wanted, err_msg=kernel.key)


@pytest.mark.parametrize("isa", checking.ISAS)
@pytest.mark.parametrize("method", ["select", "sort"])
def test_top_k_equals_a_stable_sort(method: str, isa: str) -> None:
    """Few distinct numbers, so most are tied: the lower position comes first."""
    rng = np.random.default_rng(0)
    for rows, width, k in SHAPES:
        x = rng.integers(-3, 4, (rows, width)).astype(np.float32)
        assert_exact(TopKKernel(rows, width, k, largest=width % 3 != 0), x, isa, method)


@pytest.mark.parametrize("method", ["select", "sort"])
def test_top_k_orders_infinities_and_zeros(method: str) -> None:
    """Infinities are the ends, zeros of either sign are equal, and tiny numbers of either sign are not zero."""
    x = np.array([[0.0, -np.inf, -0.0, 1e-45, np.inf, -1e-45, -np.inf, 3e38, -3e38, 0.0]], np.float32)
    for largest in (True, False):
        assert_exact(TopKKernel(1, 10, 10, largest), x, "avx2", method)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 150)),
    share=st.floats(0, 1),
    largest=st.booleans(),
    data=st.data(),
)
@settings(max_examples=8)
def test_top_k_holds_for_random_shapes(
    shape: tuple[int, int], share: float, largest: bool, data: st.DataObject
) -> None:
    """The rule's method sorts any shape exactly."""
    rows, width = shape
    kernel = TopKKernel(rows, width, max(int(share * width), 1), largest)
    x = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal(shape).astype(np.float32)
    isa = data.draw(st.sampled_from(checking.ISAS))
    assert_exact(kernel, x, isa, str(kernel.knobs(checking.target_of(isa).isa)["method"]))


def test_rule_selects_few_and_sorts_many() -> None:
    """Two experts of 64 are selected; a whole row is sorted."""
    isa = checking.target_of("avx2").isa
    assert TopKKernel(512, 64, 2).knobs(isa) == {"method": "select"}
    assert TopKKernel(1, 50000, 50).knobs(isa) == {"method": "select"}
    assert TopKKernel(1, 4096, 4096).knobs(isa) == {"method": "sort"}
