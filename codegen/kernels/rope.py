"""Rotary position (Su et al. 2021), half-split pairing, with angles from a table.

An angle is position times frequency, up to the sequence length in radians: float32 cannot hold it well enough to take
its sine at run time, so the table is made in float64 at build time and is an operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from codegen._tvm import Expr, PrimFunc, tirx
from codegen.kernels.base import Array, Isa, Kernel, Knobs, View
from codegen.kernels.emit import Vectors, bind, build_function, column_vectors, parallel_block, serial
from ir.types import TensorType


@dataclass(frozen=True)
class RopeKernel(Kernel):
    """Rotates the pairs (x_i, x_{i + K/2}) of each head by position * base^(-2i/K).

    Operands: x `[B*T, H*K]` (maybe a window of a wider buffer), the table `[positions, K]` made by `table`, then
    `offset` (int32 scalar) if there is one: token t stands at `offset + t`; out `[B*T, H*K]`.

    Attributes:
        batch: Sequences.
        t: Tokens of a sequence.
        heads: Heads.
        dim: Elements of a head, even.
        base: Base of the frequencies.
        positions: Rows of the table; t if None. Positions beyond it are read as its last row.
        offset: Whether the first token's position is an operand.
        x_view: Buffer that holds x.
    """

    batch: int
    t: int
    heads: int
    dim: int
    base: float = 10000.0
    positions: int | None = None
    offset: bool = False
    x_view: View | None = None

    family: ClassVar[str] = "rope"

    def __post_init__(self) -> None:
        if self.dim % 2:
            raise ValueError(f"rope needs an even head size, found {self.dim}")

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.positions or self.t

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Operands x, table, offset."""
        width = self.x_view.width if self.x_view else self.heads * self.dim
        operands = (TensorType((self.batch * self.t, width)), TensorType((self.rows, self.dim)))
        return (*operands, TensorType((), "int32")) if self.offset else operands

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The rotated heads."""
        return (TensorType((self.batch * self.t, self.heads * self.dim)),)

    @property
    def flops(self) -> int:
        """Three for each element."""
        return 3 * self.outputs[0].size

    def table(self) -> Array:
        """Return cosines (first half of the columns) and sines (second half) of all positions."""
        half = self.dim // 2
        angle_PK = np.arange(self.rows)[:, None] * self.base ** (-np.arange(half) / half)
        return np.concatenate([np.cos(angle_PK), np.sin(angle_PK)], axis=1).astype(np.float32)

    def knobs(self, isa: Isa) -> Knobs:
        """Nothing to choose."""
        del isa
        return {}

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the rotation."""

        def write(x: Expr, table: Expr, *rest: Expr) -> None:
            *offset, out = rest
            vec, half = Vectors(isa.lanes), self.dim // 2
            start = self.x_view.offset if self.x_view else 0
            with parallel_block(self.batch * self.t, flops=self.flops) as row:
                position = row % self.t + offset[0][()] if offset else row % self.t
                position = bind(tirx.max(tirx.min(position, self.rows - 1), 0))
                for v, live in enumerate(column_vectors(half, vec.lanes)):
                    column = v * vec.lanes
                    cos = bind(vec.load(table, position, column, live=live))
                    sin = bind(vec.load(table, position, half + column, live=live))
                    with serial(0, self.heads) as head:
                        base = head * self.dim + column
                        first = bind(vec.load(x, row, start + base, live=live))
                        second = bind(vec.load(x, row, start + base + half, live=live))
                        vec.store(out, first * cos - second * sin, row, base, live=live)
                        vec.store(out, second * cos + first * sin, row, base + half, live=live)

        return build_function(self, isa, knobs, write)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Rotate in float64, by angles computed there."""
        start = self.x_view.offset if self.x_view else 0
        x = np.asarray(arrays[0], np.float64)[:, start : start + self.heads * self.dim]
        x_BTHK = x.reshape(self.batch, self.t, self.heads, self.dim)
        half = self.dim // 2
        position_T = np.arange(self.t) + (int(arrays[2]) if self.offset else 0)
        angle_TK = position_T[:, None] * self.base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle_TK)[:, None, :], np.sin(angle_TK)[:, None, :]
        first, second = x_BTHK[..., :half], x_BTHK[..., half:]
        rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return (rotated.reshape(self.outputs[0].shape),)
