"""Running sums and elementwise linear recurrences along any axis."""

from __future__ import annotations

import numpy as np
import pytest

from codegen.kernels.scan import ScanKernel
from tests.codegen.kernels.batches import ISAS, check_all, inputs_of

SHAPES = ((1, 1, 1), (1, 5, 1), (3, 11, 37), (2, 1, 16), (2, 50, 8), (1, 7, 64), (5, 3, 1), (2, 40, 370))
KERNELS = {
    f"{'decay' if decay else 'sum'}-{outer}x{steps}x{inner}": ScanKernel(outer, steps, inner, decay)
    for outer, steps, inner in SHAPES
    for decay in (False, True)
}


@pytest.mark.parametrize("isa", ISAS)
def test_scan_equals_reference(isa: str) -> None:
    """One step or many, inner sizes below, at and beyond whole vectors, serial and parallel."""
    inputs = {}
    for name, kernel in KERNELS.items():
        *decays, updates = inputs_of(kernel)
        inputs[name] = [*(1.0 / (1.0 + np.exp(-decay)) for decay in decays), updates]  # decays below one: no overflow
    check_all(KERNELS, isa, inputs=inputs)


@pytest.mark.parametrize(
    ("axis", "expected"), [(0, (1, 2, 105)), (1, (2, 3, 35)), (-1, (42, 5, 1)), (-2, (6, 7, 5)), (3, (42, 5, 1))]
)
def test_along_splits_the_shape_at_the_axis(axis: int, expected: tuple[int, int, int]) -> None:
    """An axis counted from either end becomes the middle one of three."""
    kernel = ScanKernel.along((2, 3, 7, 5), axis, decay=True)
    assert (kernel.outer, kernel.steps, kernel.inner) == expected
    assert kernel.key == f"scan(outer={expected[0]},steps={expected[1]},inner={expected[2]},decay)"
