"""Additions at positions that are data: repeated ones, along every axis, one index for a row or one an element."""

from __future__ import annotations

import numpy as np
import pytest

from codegen.kernels.scatter import ScatterAddKernel
from tests.codegen.kernels.batches import ISAS, check_all

KERNELS = {
    "rows": ScatterAddKernel((5, 37), (9, 1), (9, 37), 0),
    "rows_of_sequences": ScatterAddKernel((2, 4, 300), (2, 6, 1), (2, 6, 300), 1),
    "one_index_for_all_sequences": ScatterAddKernel((3, 4, 8), (1, 6, 1), (3, 6, 8), 1),
    "elements": ScatterAddKernel((2, 5), (2, 7), (2, 7), 1),
    "each_its_own": ScatterAddKernel((2, 4, 3), (2, 6, 3), (2, 6, 3), 1),
    "some_shared": ScatterAddKernel((2, 4, 3, 2), (2, 6, 1, 2), (2, 6, 3, 2), 1),
    "one": ScatterAddKernel((1,), (3,), (3,), 0),
}


def inputs_of(kernel: ScatterAddKernel) -> list[np.ndarray]:
    """Random numbers and positions, most of which repeat."""
    rng = np.random.default_rng(0)
    base, updates = (rng.standard_normal(shape).astype(np.float32) for shape in (kernel.base, kernel.updates))
    return [base, rng.integers(0, kernel.base[kernel.axis], kernel.indices, dtype=np.int32), updates]


@pytest.mark.parametrize("isa", ISAS)
def test_scatter_add_equals_reference(isa: str) -> None:
    """Every layout of indices, every knob."""
    check_all(KERNELS, isa, inputs={name: inputs_of(kernel) for name, kernel in KERNELS.items()}, every_knob=True)
