"""A function of a model as one function of machine code: its kernels run one after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codegen import targets
from ir.builder import Builder
from tests.codegen.building import run_graph


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("turns", [2, 3, 4])
def test_small_kernels_keep_their_order(turns: int, size: int, tmp_path: Path) -> None:
    """Sums along rows and transposes in turns write and read the same memory and are so small that LLVM merges them."""
    b = Builder()
    y = b.input("x", (1, size, size))
    for _ in range(turns):
        y = b.transpose(b.cumsum(y, 1), 0, 2, 1)
    expected = array = np.random.default_rng(size).integers(-3, 4, (1, size, size)).astype(np.float32)
    for _ in range(turns):
        expected = expected.cumsum(1).transpose(0, 2, 1)
    built, outputs = run_graph(b.build(y=y), {}, targets.get("cpu", threads=1), tmp_path, {"x": array})
    assert [record["family"] for record in built.functions["forward"].kernels] == ["scan", "fused"] * turns
    np.testing.assert_array_equal(outputs["y"], expected)  # whole numbers far below 2^24: float32 sums are exact
