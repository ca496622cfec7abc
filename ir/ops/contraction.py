"""Matrix products."""

from __future__ import annotations

from typing import Final, Literal, get_args

import numpy as np

from ir.op import Array, Op, Types, broadcast_shapes, op, require
from ir.rounding import round_to_bfloat16
from ir.types import TensorType

Precision = Literal["float32", "bfloat16"]
"""What the operands of a product are rounded to; float32 leaves them as they are."""
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)


@op
class Matmul(Op):
    """Batched matrix product `[..., M, K] x [..., K, N] -> [..., M, N]`; leading axes broadcast.

    `transpose_a` and `transpose_b` read that operand with its last two axes swapped. With
    `precision="bfloat16"` both operands are rounded to bfloat16 first (to nearest, ties to even); sums and result keep
    the operands' dtype.
    """

    transpose_a: bool = False
    transpose_b: bool = False
    precision: Precision = "float32"

    later = frozenset({"precision"})

    def infer(self, a: TensorType, b: TensorType) -> TensorType:
        require(
            self.precision in PRECISIONS, "unknown precision", expected=" or ".join(PRECISIONS), found=self.precision
        )
        require(a.rank >= 2 and b.rank >= 2, "matmul needs operands of rank 2 or more", found=f"{a} and {b}")
        require(a.dtype == b.dtype and a.is_float, "matmul needs equal float dtypes", found=f"{a} and {b}")
        rows, inner = (a.shape[-1], a.shape[-2]) if self.transpose_a else (a.shape[-2], a.shape[-1])
        depth, columns = (b.shape[-1], b.shape[-2]) if self.transpose_b else (b.shape[-2], b.shape[-1])
        require(inner == depth, "matmul inner sizes differ", expected=f"{inner} rows", found=f"{depth} in {a} x {b}")
        return a.with_shape((*broadcast_shapes(a.shape[:-2], b.shape[:-2]), rows, columns))

    def evaluate(self, a: Array, b: Array) -> Array:
        if self.precision == "bfloat16":
            a, b = round_to_bfloat16(a), round_to_bfloat16(b)
        return np.matmul(
            np.swapaxes(a, -1, -2) if self.transpose_a else a, np.swapaxes(b, -1, -2) if self.transpose_b else b
        )

    def flops(self, operands: Types, results: Types) -> int:
        inner = operands[0].shape[-2 if self.transpose_a else -1]
        return 2 * results[0].size * inner

    def macs(self, operands: Types, results: Types) -> int:
        return self.flops(operands, results) // 2
