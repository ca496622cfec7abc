"""Depthwise and nearly depthwise convolution, and pooling, over 1 to 3 spatial axes, channels last.

A strip of neighbouring outputs along the last spatial axis stays in registers, a vector of channels each, while the
taps run: an input is loaded once for all the outputs of the strip that see it. Strips that meet the padding are written
out for their place, so padding is never stored and never tested; those between share one loop. Wide or far spread
windows, whose borders would be much code, read a copy of their input with the padding around it.

Groups of a few channels share a vector: their inputs are spread over its lanes by a shuffle for each input channel.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import PrimFunc
from codegen.kernels._tail import row_count, tail_flops, tail_operands, tail_reference
from codegen.kernels._taps import Taps
from codegen.kernels._window_writer import CopyWriter, StripWriter
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.emit import LINE_BYTES, Split, build_function, ceil_div
from ir.graph import Graph
from ir.ops.convolution import Conv, Pool
from ir.types import TensorType

SERIAL_BELOW: Final = 32 * 1024
"""Multiply-adds below which starting threads costs more than it saves."""
LONGEST_STRIP: Final = 14
MOST_VECTORS: Final = 4
BORDER_STRIPS: Final = 8
"""Strips at the borders that are written out; more of them read a copy instead."""
WIDEST_UNROLLED: Final = 16
"""Taps along the last axis that are written out."""
NARROW_GROUPS: Final = (1, 2, 4)
"""Output channels of a group that divide every vector."""
NARROW_WINDOW: Final = 7
"""Longest window and padding of narrow groups, which are always written out."""
LATENCY: Final = 8
"""Independent sums that hide the latency of an addition."""
FEW_TAPS: Final = 16
"""Taps up to which a window operation waits for memory, not for arithmetic."""
PAGE_BYTES: Final = 4096
CACHE_LINES: Final = 64
"""Lines of a way of the first-level cache, which has so many:"""
CACHE_WAYS: Final = 8
FAR_CHANNELS: Final = 256
"""Channels walked together where pixels lie whole pages apart."""


@dataclass(frozen=True)
class WindowKernel(Kernel):
    """An `ir` pooling or convolution in narrow groups (`is_narrow`) on `[B, *S, C]`.

    Operands: x, the weights `[*W, C / groups, O]` of a convolution, further inputs of the tail; the output.

    Attributes:
        x: Type of the input.
        weight: Type of the weights; None for pooling.
        op: The operation.
        tail: Elementwise operations on its result, see `codegen.kernels._tail.Tail`.
        packed: Whether the weights are known when the model is compiled, so can be packed: `[O / L, taps, L]` for
            vectors of L channels, each tap for each input channel of a group.
    """

    x: TensorType
    weight: TensorType | None
    op: Conv | Pool
    tail: Graph | None = None
    packed: bool = True

    family: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        if isinstance(self.op, Conv) and (self.weight is None or not is_narrow(self.op, self.weight)):
            raise ValueError("a convolution that mixes many channels is a ConvKernel")

    @property
    def channels(self) -> int:
        """Channels of the output."""
        return self.result.shape[-1]

    @property
    def depth(self) -> int:
        """Input channels that an output channel sees."""
        return self.weight.shape[-2] if self.weight else 1

    @property
    def group_outputs(self) -> int:
        """Output channels of a group; 1 for pooling."""
        return self.channels // self.op.groups if isinstance(self.op, Conv) else 1

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Input, weights, operands of the tail."""
        return (self.x, *([] if self.weight is None else [self.weight]), *tail_operands(self.tail))

    @property
    def result(self) -> TensorType:
        """What the operation itself gives."""
        return self.op.infer_types(self.inputs[: 1 + (self.weight is not None)])[0]

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """What the tail makes of it."""
        return (self.tail.type_of(self.tail.outputs[0][1]) if self.tail else self.result,)

    @property
    def flops(self) -> int:
        """Those of the operation and of its tail."""
        return self.op.flops(self.inputs, (self.result,)) + tail_flops(self.tail)

    @property
    def key(self) -> str:
        """The operation, and a digest of the tail."""
        weights = f"{self.weight}{'' if self.packed else ' as it is'}"
        return with_tail(f"{self.family}({self.op},x={self.x},weight={weights}", self.tail)

    @property
    def window(self) -> tuple[int, ...]:
        """Taps along each spatial axis."""
        return self.op.window if isinstance(self.op, Pool) else self.inputs[1].shape[:-2]

    @property
    def taps(self) -> Taps:
        """Sizes of the window."""
        return Taps.of(self.op, self.x.shape, self.result.shape, self.window)

    def packs(self, index: int) -> bool:
        """Weights that are known are packed."""
        return index == 1 and self.weight is not None and self.packed

    def packed_shape(self, index: int, isa: Isa, knobs: Knobs) -> tuple[int, ...]:
        """Vectors of channels, the taps of each side by side."""
        if not self.packs(index):
            return self.inputs[index].shape
        return (ceil_div(self.channels, isa.lanes), math.prod(self.window) * self.depth, isa.lanes)

    def pack(self, index: int, array: Array, isa: Isa, knobs: Knobs) -> Array | None:
        """Pad the channels to whole vectors and bring the taps of each together."""
        if not self.packs(index):
            return None
        vectors, taps, lanes = self.packed_shape(index, isa, knobs)
        padded = np.pad(array.reshape(taps, self.channels), ((0, 0), (0, vectors * lanes - self.channels)))
        return np.ascontiguousarray(padded.reshape(taps, vectors, lanes).transpose(1, 0, 2), dtype=np.float32)

    def knobs(self, isa: Isa) -> Knobs:
        """Choose the longest strip that registers and cache hold, and more vectors where strips are short."""
        most = min(LONGEST_STRIP, self.taps.outputs[-1])
        fits = [n for n in range(2, most + 1) if self._registers(n, 1) <= isa.registers and not self._competes(n)]
        length = Split(self.taps.outputs[-1], max(fits, default=1)).longest
        vectors = 1
        while length * vectors < LATENCY and vectors < min(MOST_VECTORS, ceil_div(self.channels, isa.lanes)):
            if self._registers(length, vectors + 1) > isa.registers:
                break
            vectors += 1
        return self._complete(isa, length, vectors)

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Shorter strips, more vectors, threads or none."""
        rule = self.knobs(isa)
        space = [rule]
        lengths = dict.fromkeys((int(rule["strip"]), max(int(rule["strip"]) // 2, 1), min(4, self.taps.outputs[-1])))
        for length in lengths:
            for vectors in (1, 2):
                knobs = self._complete(isa, length, min(vectors, ceil_div(self.channels, isa.lanes)))
                for candidate in (knobs, {**knobs, "parallel": not knobs["parallel"]}):
                    if candidate not in space and (isa.threads > 1 or not candidate["parallel"]):
                        space.append(candidate)
        return space

    def _competes(self, strip: int) -> bool:
        """Whether the pixels of a strip are so far apart that they drive each other out of the first-level cache.

        That costs most where each is used a few times only.
        """
        lines = CACHE_LINES // math.gcd(CACHE_LINES, ceil_div(self.channels * 4, LINE_BYTES))
        return math.prod(self.window) <= FEW_TAPS and self.taps.reach(strip) + strip > lines * (CACHE_WAYS - 1)

    def _registers(self, strip: int, vectors: int) -> int:
        """Registers of a strip: sums, weights of a line of taps, an input."""
        if isinstance(self.op, Pool):
            return (self.taps.reach(strip) if not self._spread() else strip) * vectors + 2
        return strip * vectors + min(self.window[-1] * self.depth, WIDEST_UNROLLED) + self.depth

    def _spread(self) -> bool:
        """Whether the window is too wide to be written out tap by tap."""
        return self.window[-1] > WIDEST_UNROLLED

    def _complete(self, isa: Isa, strip: int, vectors: int) -> dict[str, int | str | bool]:
        """Knobs of a strip: whether it reads a copy, in how many chunks channels are walked, whether by threads."""
        taps = self.taps
        strips = Split(taps.outputs[-1], strip)
        meets = sum(
            not taps.is_inside(int(strips.start(i)), strips.small + (i < strips.longer)) for i in range(strips.count)
        )
        copy = self.depth == self.group_outputs == 1 and (self._spread() or meets > BORDER_STRIPS)
        parallel = isa.threads > 1 and self.flops >= SERIAL_BELOW
        rows, blocks = math.prod(self.result.shape[:-2]), ceil_div(self.channels, vectors * isa.lanes)
        far = self._competes(strip + 1) and self.channels * 4 % PAGE_BYTES == 0
        chunks = ceil_div(self.channels, FAR_CHANNELS) if far else 1
        if parallel:
            chunks = max(chunks, ceil_div(4 * isa.threads, rows))
        return {"strip": strip, "vectors": vectors, "copy": copy, "chunks": min(chunks, blocks), "parallel": parallel}

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the loop nest."""
        writer = CopyWriter if knobs["copy"] else StripWriter
        return build_function(self, isa, knobs, lambda *buffers: writer(self, isa, knobs, buffers).write())

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Interpret the operation and its tail in float64."""
        operands = tuple(np.asarray(array, np.float64) for array in arrays)
        count = 1 + (self.weight is not None)
        (value,) = self.op.evaluate_all(operands[:count])
        return (tail_reference(self.tail, value, operands[count:]),)

    @property
    def rows(self) -> int:
        """Outputs of a channel."""
        return row_count(self.result.shape)


def is_narrow(op: Conv, weight: TensorType) -> bool:
    """Whether a convolution is depthwise, or has groups of so few channels that many fit a vector."""
    depth, outputs = weight.shape[-2], weight.shape[-1] // op.groups
    if depth == outputs == 1:
        return True
    near = max(*weight.shape[:-2], *(max(sides) for sides in op.padding)) <= NARROW_WINDOW and max(op.dilation) == 1
    return depth <= outputs and outputs in NARROW_GROUPS and op.groups > 1 and near


def with_tail(key: str, tail: Graph | None) -> str:
    """Finish the key of a kernel by the names of its tail's operations and a digest of the whole tail."""
    if tail is None:
        return f"{key})"
    names = "-".join(node.op.name for node in tail.nodes if node.operands)
    text = ";".join(f"{node.op}{node.operands}{node.types}" for node in tail.nodes)
    return f"{key},tail={names}:{hashlib.sha256(text.encode()).hexdigest()[:16]})"
