"""Reading and writing at positions that are data."""

from __future__ import annotations

import numpy as np

from ir.op import Array, Op, Types, normal_axis, op, require
from ir.types import TensorType


@op
class Take(Op):
    """Rows of a table: `[V, ...]` and int32 indices `[...]` give `[*indices, ...]`. Indices are in `0..V-1`."""

    def infer(self, table: TensorType, indices: TensorType) -> TensorType:
        require(indices.dtype == "int32", "take needs int32 indices", found=indices)
        require(table.rank >= 1, "take needs a table of rows", found=table)
        return table.with_shape((*indices.shape, *table.shape[1:]))

    def evaluate(self, table: Array, indices: Array) -> Array:
        return table[indices]

    def bytes_moved(self, operands: Types, results: Types) -> int:
        return operands[1].size_bytes + 2 * results[0].size_bytes


@op
class DynamicUpdate(Op):
    """A copy of `base` with `update` written at a run-time position along one axis.

    Operands: base `[..., L, ...]`, update `[..., n, ...]`, position int32 scalar with `0 <= position <= L - n`.
    """

    axis: int

    def infer(self, base: TensorType, update: TensorType, position: TensorType) -> TensorType:
        axis = normal_axis(self.axis, base.rank)
        require(position.shape == () and position.dtype == "int32", "position must be an int32 scalar", found=position)
        beside = update.shape[:axis] + update.shape[axis + 1 :]
        require(
            update.rank == base.rank and beside == base.shape[:axis] + base.shape[axis + 1 :],
            "update does not fit the base",
            found=f"{update} into {base}",
        )
        require(update.dtype == base.dtype, "update and base need equal dtypes", found=f"{update} into {base}")
        require(update.shape[axis] <= base.shape[axis], "update is longer than the base", found=f"{update} into {base}")
        return base

    def evaluate(self, base: Array, update: Array, position: Array) -> Array:
        index: list[slice] = [slice(None)] * base.ndim
        index[self.axis] = slice(int(position), int(position) + update.shape[self.axis])
        result: Array = np.array(base)
        result[tuple(index)] = update
        return result

    def bytes_moved(self, operands: Types, results: Types) -> int:
        return 2 * operands[1].size_bytes  # in place where the base is not read again
