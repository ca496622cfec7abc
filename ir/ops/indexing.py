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
class Gather(Op):
    """Elements at indices along one axis: y[..., i, ...] = x[..., indices[..., i, ...], ...].

    Operands: x `[..., L, ...]` and int32 indices in `0..L-1` of the same rank. Beside the axis the indices have the
    sizes of x, or 1 where one index serves every position. Result: x with the axis as long as that of the indices.
    """

    axis: int

    def infer(self, x: TensorType, indices: TensorType) -> TensorType:
        axis = normal_axis(self.axis, x.rank)
        _check_indices(x, indices, axis)
        return x.with_shape((*x.shape[:axis], indices.shape[axis], *x.shape[axis + 1 :]))

    def evaluate(self, x: Array, indices: Array) -> Array:
        return np.take_along_axis(x, indices, self.axis)

    def bytes_moved(self, operands: Types, results: Types) -> int:
        return operands[1].size_bytes + 2 * results[0].size_bytes


@op
class ScatterAdd(Op):
    """A copy of the base with each update added where its index says, along one axis; indices may repeat.

    Operands: base `[..., L, ...]`, int32 indices in `0..L-1`, updates `[..., n, ...]`. Beside the axis the indices have
    the sizes of the updates, or 1 where one index serves every position.
    """

    axis: int

    def infer(self, base: TensorType, indices: TensorType, updates: TensorType) -> TensorType:
        axis = normal_axis(self.axis, base.rank)
        require(updates.dtype == base.dtype and base.is_float, "scatter_add needs equal float dtypes", found=updates)
        require(
            updates.rank == base.rank and _beside(updates, axis) == _beside(base, axis),
            "updates do not fit the base",
            found=f"{updates} into {base}",
        )
        _check_indices(updates, indices, axis)
        same = indices.shape[axis] == updates.shape[axis]
        require(same, "each update needs an index", expected=str(updates.shape[axis]), found=indices)
        return base

    def evaluate(self, base: Array, indices: Array, updates: Array) -> Array:
        axis = self.axis % base.ndim
        places: list[Array] = list(np.indices(updates.shape, sparse=True))
        places[axis] = np.broadcast_to(indices, updates.shape)
        result: Array = np.array(base)
        np.add.at(result, tuple(places), updates)
        return result

    def flops(self, operands: Types, results: Types) -> int:
        return operands[2].size


def _beside(kind: TensorType, axis: int) -> tuple[int, ...]:
    return kind.shape[:axis] + kind.shape[axis + 1 :]


def _check_indices(x: TensorType, indices: TensorType, axis: int) -> None:
    """Indices along an axis fit a tensor.

    Raises:
        GraphError: Wrong element type or sizes.
    """
    require(indices.dtype == "int32", "indices must be int32", found=indices)
    fits = indices.rank == x.rank and all(
        size in (1, whole) for size, whole in zip(_beside(indices, axis), _beside(x, axis), strict=True)
    )
    require(fits, "indices do not fit", expected=f"sizes of {x} or 1 beside axis {axis}", found=indices)


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
