"""Convolution that mixes channels, over 1 to 3 spatial axes, channels last: a product of shifted rows of the input.

R outputs of a line times V vectors of output channels stay in registers while the taps and the input channels run, as
in `codegen.kernels.gemm`; nothing is gathered. The input is copied first, line by line with the padding of the last
axis around it, unless there is none; a line ends where its pixels would compete for lines of the cache.

Weights are packed `[G, O/W, taps, C, W]`: G groups, O and C channels of a group out and in, W the panel width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import PrimFunc
from codegen.kernels._conv_writer import ConvWriter
from codegen.kernels._tail import row_count, tail_flops, tail_operands, tail_reference
from codegen.kernels._taps import Taps
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.emit import Split, build_function, ceil_div
from codegen.kernels.window import with_tail
from ir.graph import Graph
from ir.ops.convolution import Conv
from ir.types import TensorType

MOST_ROWS: Final = 14
MOST_VECTORS: Final = 4
SERIAL_BELOW: Final = 64 * 1024
"""Multiply-adds below which starting threads costs more than it saves."""


@dataclass(frozen=True)
class ConvKernel(Kernel):
    """An `ir` convolution on `[B, *S, C]`, dense or in groups.

    Operands: x, the weights `[*W, C / groups, O]`, further inputs of the tail; the output.

    Attributes:
        x: Type of the input.
        weight: Type of the weights.
        op: The operation.
        tail: Elementwise operations on its result, see `codegen.kernels._tail.Tail`.
        packed: Whether the weights are known when the model is compiled, so can be packed.
    """

    x: TensorType
    weight: TensorType
    op: Conv
    tail: Graph | None = None
    packed: bool = True

    family: ClassVar[str] = "conv"

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Input, weights, operands of the tail."""
        return (self.x, self.weight, *tail_operands(self.tail))

    @property
    def result(self) -> TensorType:
        """What the convolution itself gives."""
        return self.op.infer_types((self.x, self.weight))[0]

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """What the tail makes of it."""
        return (self.tail.type_of(self.tail.outputs[0][1]) if self.tail else self.result,)

    @property
    def flops(self) -> int:
        """Those of the convolution, padding included, and of its tail."""
        return self.op.flops(self.inputs, (self.result,)) + tail_flops(self.tail)

    @property
    def key(self) -> str:
        """The operation, and a digest of the tail."""
        weights = f"{self.weight}{'' if self.packed else ' as it is'}"
        return with_tail(f"{self.family}({self.op},x={self.x},weight={weights}", self.tail)

    @property
    def taps(self) -> Taps:
        """Sizes of the window."""
        return Taps.of(self.op, self.x.shape, self.result.shape, self.weight.shape[:-2])

    @property
    def rows(self) -> int:
        """Outputs of a channel."""
        return row_count(self.result.shape)

    @property
    def group_outputs(self) -> int:
        """Output channels of a group."""
        return self.weight.shape[-1] // self.op.groups

    # Packing

    def packs(self, index: int) -> bool:
        """Weights that are known are packed."""
        return index == 1 and self.packed

    def packed_shape(self, index: int, isa: Isa, knobs: Knobs) -> tuple[int, ...]:
        """Panels `[groups * panels, taps * C, W]`, zero behind the last channel of a group."""
        if not self.packs(index):
            return self.inputs[index].shape
        width = int(knobs["vectors"]) * isa.lanes
        return (self.op.groups * ceil_div(self.group_outputs, width), row_count(self.weight.shape), width)

    def pack(self, index: int, array: Array, isa: Isa, knobs: Knobs) -> Array | None:
        """Pad the output channels of each group to whole panels and cut them."""
        if not self.packs(index):
            return None
        panels, length, width = self.packed_shape(index, isa, knobs)
        groups = self.op.groups
        split = array.reshape(length, groups, self.group_outputs)
        padded = np.pad(split, ((0, 0), (0, 0), (0, panels // groups * width - self.group_outputs)))
        cut = padded.reshape(length, panels, width).transpose(1, 0, 2)
        return np.ascontiguousarray(cut, dtype=np.float32)

    # Knobs

    def knobs(self, isa: Isa) -> Knobs:
        """Choose the register tile with the least estimated work."""
        return self._complete(isa, *self._ranked(isa)[0])

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Return the tiles by estimated work."""
        return [self._complete(isa, *tile) for tile in self._ranked(isa)]

    def _ranked(self, isa: Isa) -> list[tuple[int, int]]:
        line = self.taps.outputs[-1]
        tiles = [(min((isa.registers - 1 - v) // v, MOST_ROWS, line), v) for v in range(1, MOST_VECTORS + 1)]
        tiles = [(Split(line, rows).longest, v) for rows, v in tiles]
        return sorted(tiles, key=lambda tile: self._cycles(isa, *tile))

    def _cycles(self, isa: Isa, rows: int, vectors: int) -> float:
        """Estimate the cycles of one input channel of one tap over a line: products, loads, or latency."""
        split, all_vectors = Split(self.taps.outputs[-1], rows), ceil_div(self.group_outputs, isa.lanes)
        heights = {split.small + 1: split.longer, split.small: split.count - split.longer}
        widths = {vectors: all_vectors // vectors, all_vectors % vectors: 1}
        return sum(
            tiles * panels * max(height * width, height + width, 8)
            for height, tiles in heights.items()
            for width, panels in widths.items()
            if height and width
        )

    def _complete(self, isa: Isa, rows: int, vectors: int) -> dict[str, int | str | bool]:
        lines = row_count(self.result.shape[:-1])
        panels = self.op.groups * ceil_div(self.group_outputs, vectors * isa.lanes)
        balanced = panels % isa.threads == 0 or panels >= 8 * isa.threads
        alone = isa.threads == 1 or self.flops < SERIAL_BELOW
        return {"rows": rows, "vectors": vectors, "chunks": 1 if alone or balanced else min(isa.threads, lines)}

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the loop nest."""
        return build_function(self, isa, knobs, lambda *buffers: ConvWriter(self, isa, knobs, buffers).write())

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Interpret the convolution and its tail in float64."""
        x, weight, *operands = (np.asarray(array, np.float64) for array in arrays)
        (value,) = self.op.evaluate_all((x, weight))
        return (tail_reference(self.tail, value, operands),)
