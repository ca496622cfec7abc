"""Softmax along an axis that is not the last."""

from __future__ import annotations

import numpy as np
import pytest

from codegen.kernels.softmax import SoftmaxKernel
from tests.codegen.kernels.batches import ISAS, check_all

SHAPES = ((1, 1, 1), (1, 5, 1), (3, 11, 37), (2, 1, 16), (2, 50, 8), (1, 7, 64), (2, 9, 70), (2, 40, 370))
KERNELS = {"x".join(map(str, shape)): SoftmaxKernel(*shape) for shape in SHAPES}


@pytest.mark.parametrize("isa", ISAS)
def test_softmax_equals_reference(isa: str) -> None:
    """One step or many, inner sizes below, at and beyond whole vectors, serial and parallel."""
    check_all(KERNELS, isa)


def test_softmax_every_knob_gives_the_same() -> None:
    """However many vectors are walked together."""
    check_all({"block": SoftmaxKernel(2, 9, 70)}, "avx2", every_knob=True)


def test_softmax_of_large_scores_does_not_overflow() -> None:
    """Only differences count: powers of a thousand are never taken."""
    x = (1000.0 * np.random.default_rng(0).standard_normal((2, 5, 20))).astype(np.float32)
    check_all({"large": SoftmaxKernel(2, 5, 20)}, "avx2", inputs={"large": [x]})


@pytest.mark.parametrize(("axis", "expected"), [(0, (1, 2, 105)), (1, (2, 3, 35)), (-2, (6, 7, 5))])
def test_along_splits_the_shape_at_the_axis(axis: int, expected: tuple[int, int, int]) -> None:
    """An axis counted from either end becomes the middle one of three."""
    assert SoftmaxKernel.along((2, 3, 7, 5), axis) == SoftmaxKernel(*expected)
