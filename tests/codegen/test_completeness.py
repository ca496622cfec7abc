"""Every operation has a row in every backend; what lacks one is printed as a table."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from codegen.kernels.expressions import EXPRESSIONS
from codegen.onnx_export.table import ONNX
from codegen.selection.select import GENERATORS
from codegen.torch_backend import TORCH
from ir.op import Op
from ir.ops.control import Loop
from ir.ops.normalization import BatchNorm
from ir.ops.reduction import Max, Mean, Sum
from ir.ops.structure import Component, Constant, Input, Parameter
from tests.ir.completeness import missing_rows

STRUCTURE: tuple[type[Op], ...] = (Component, Constant, Input, Loop, Parameter)
"""Served by the backends themselves, or expanded before they see it."""

BACKENDS: dict[str, Collection[type[Op]]] = {
    "torch (codegen.torch_backend.TORCH)": TORCH,
    "onnx (codegen.onnx_export.table.ONNX)": ONNX,
    "kernels (codegen.selection.select.GENERATORS, codegen.kernels.expressions.EXPRESSIONS, reductions)": (
        *GENERATORS,
        *EXPRESSIONS,
        *(Sum, Mean, Max),
        BatchNorm,  # ir.passes.lower_batch_norm leaves none
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_serves_every_operation(backend: str) -> None:
    """No operation of the IR is without a row."""
    table = dict.fromkeys(BACKENDS[backend])
    missing = missing_rows(table, but=STRUCTURE)
    assert not missing, "\n".join(["", f"{backend} lacks:", *(f"  {name}" for name in missing)])


def test_no_row_is_served_twice() -> None:
    """An operation with a generator of its own is not also fused, the rope aside: by table, or by run-time position."""
    assert [op.name for op in GENERATORS if op in EXPRESSIONS] == ["rope"]
