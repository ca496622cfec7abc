"""The ONNX row of each operation."""

from __future__ import annotations

from typing import Final

from codegen.onnx_export import attention, control, elementwise, products, rearranging, recurrence, spectral
from codegen.onnx_export.emitter import Table

ONNX: Final[Table] = {
    **elementwise.ROWS,
    **rearranging.ROWS,
    **products.ROWS,
    **attention.ROWS,
    **recurrence.ROWS,
    **control.ROWS,
    **spectral.ROWS,
}
