"""Dense products on packed weights with fused epilogues.

M rows, N columns, K the reduced length, W the panel width in elements. The weight is packed `[N/W][K][W]`, zero-padded
in N, so one micro-kernel reads it as a stream. A tile of `rows x vectors` accumulators stays in registers while k
runs; tiles cover M as evenly as they can, so no tile is left with a single row unless M is 1.

In bfloat16 the reduced length goes in steps of two: a weight is packed `[N/W][K/2][W]` of pairs, and one instruction
adds both products of a pair. The step, not K, is then what tiles and blocks are counted in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import PrimFunc
from codegen.kernels import strassen
from codegen.kernels._gemm_writer import GemmWriter
from codegen.kernels.base import Array, Isa, Kernel, Knobs, View
from codegen.kernels.bfloat16 import WORD
from codegen.kernels.emit import Split, Vectors, build_function, ceil_div
from codegen.kernels.vector_math import ACTIVATION_REFERENCES
from ir.ops.contraction import Precision
from ir.rounding import bfloat16_bits, from_bfloat16_bits, round_to_bfloat16
from ir.types import TensorType

STEP_BYTES: Final = 4  # one float32, or a pair of bfloat16
CACHE_BYTES: Final = 512 * 1024  # half of the L2 cache of current server cores
CHUNK_BYTES: Final = 256 * 1024  # rows of A that stay in the other half
K_BLOCK_FROM: Final = 4096  # a panel of this length still streams from L2 without loss
K_BLOCK: Final = 2048
PAGE_BYTES: Final = 4096  # rows of A this far apart compete for the same lines of the first-level cache,
COMPETING_ROWS: Final = 8  # which has eight ways
WIDENING_REGISTERS: Final = 3  # what LLVM keeps besides, where pairs are widened to float32: with 2 it spills sums
SEVEN_FROM_ROWS: Final = 16
SEVEN_FROM_K: Final = 64
SEVEN_KNOBS: Final = 6  # ways that tuning may try
WORTH_SEVEN: Final = 0.96  # more code and 7/4 of the memory, for an estimate that is 4 % off, is worth this much


@dataclass(frozen=True)
class GemmKernel(Kernel):
    """`out = activation(scale * a @ w + bias) + residual`, or with `gate` a gated linear unit.

    With `gate`, `w` is `[K, 2 N]` and `bias` `[2 N]`: the first N columns are the value, the others the gate, and
    `out = activation_gate(gate) * value + residual`.

    Operands: a `[M, K]` (or a window of a wider buffer), w, bias if any, residual `[M, N]` if any; out `[M, N]`.

    Attributes:
        m: Rows.
        n: Columns of the output.
        k: Reduced length.
        bias: Whether a bias is added.
        activation: Name in `vector_math.ACTIVATIONS`, applied after the bias.
        gate: Activation of the gate; makes it a gated linear unit.
        residual: Whether a tensor is added last.
        scale: Factor of the product.
        a_view: Buffer that holds `a` as `k` of its columns.
        precision: `bfloat16` rounds a and w, and sums in float32.
        a_dtype: How a is stored; what is stored as bfloat16 was rounded by the kernel that wrote it.
        out_dtype: How the output is stored.
    """

    m: int
    n: int
    k: int
    bias: bool = False
    activation: str | None = None
    gate: str | None = None
    residual: bool = False
    scale: float = 1.0
    a_view: View | None = None
    precision: Precision = "float32"
    a_dtype: str = "float32"
    out_dtype: str = "float32"

    family: ClassVar[str] = "gemm"

    def __post_init__(self) -> None:
        if self.activation and self.gate:
            raise ValueError("a gated product takes its activation from gate, not from activation")
        if self.a_dtype == "bfloat16":
            if self.precision != "bfloat16":
                raise ValueError("a product in float32 does not read bfloat16")
            if self.a_view or self.k % WORD:
                raise ValueError("rows stored as bfloat16 are read in pairs: k must be even and a not a window")

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Operands a, w, bias, residual."""
        operands = [
            TensorType((self.m, self.a_view.width if self.a_view else self.k), self.a_dtype),
            TensorType((self.k, self.columns)),
        ]
        if self.bias:
            operands.append(TensorType((self.columns,)))
        if self.residual:
            operands.append(TensorType((self.m, self.n)))
        return tuple(operands)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The product."""
        return (TensorType((self.m, self.n), self.out_dtype),)

    @property
    def steps(self) -> int:
        """Steps of the reduced length: numbers, or pairs of bfloat16."""
        return ceil_div(self.k, WORD) if self.precision == "bfloat16" else self.k

    @property
    def columns(self) -> int:
        """Columns of the weight."""
        return 2 * self.n if self.gate else self.n

    @property
    def flops(self) -> int:
        """Multiply-adds of the product, and one for each epilogue step."""
        steps = sum((self.bias, self.activation is not None, 2 * (self.gate is not None), self.residual))
        return 2 * self.m * self.columns * self.k + steps * self.m * self.n

    # Storage

    def rounds(self, index: int) -> bool:
        """A product in bfloat16 takes whole rows of pairs."""
        return index == 0 and self.precision == "bfloat16" and self.a_view is None and self.k % WORD == 0

    def can_round(self, index: int) -> bool:
        """The output may be rounded by the epilogue."""
        return index == 0

    def in_bfloat16(self, inputs: frozenset[int], outputs: frozenset[int]) -> GemmKernel:
        """Return the product that reads a, writes the output, or both, as bfloat16."""
        return replace(
            self,
            a_dtype="bfloat16" if 0 in inputs else self.a_dtype,
            out_dtype="bfloat16" if 0 in outputs else self.out_dtype,
        )

    # Packing

    def packs(self, index: int) -> bool:
        """Weight and bias are packed."""
        return index == 1 or (self.bias and index == 2)

    def packed_shape(self, index: int, isa: Isa, knobs: Knobs) -> tuple[int, ...]:
        """Panels `[N/W, K, W]` of the weight, and the bias padded alike."""
        if not self.packs(index):
            return self.inputs[index].shape
        panels, width = self._panels(isa, knobs), int(knobs["vectors"]) * isa.lanes
        if index == 2:
            return ((panels + panels % 2 if knobs["strassen"] else panels) * width,)
        return strassen.packed_shape(panels, self.k, width) if knobs["strassen"] else (panels, self.steps, width)

    def packed_dtype(self, index: int) -> str:
        """Pairs of bfloat16 are packed as words."""
        return "int32" if index == 1 and self.precision == "bfloat16" else super().packed_dtype(index)

    def pack(self, index: int, array: Array, isa: Isa, knobs: Knobs) -> Array | None:
        """Pad N to whole panels, interleave value and gate vectors, and cut into panels."""
        if not self.packs(index):
            return None
        panels, width = self._panels(isa, knobs), int(knobs["vectors"]) * isa.lanes
        panels += panels % 2 if knobs["strassen"] and index == 2 else 0
        rows = array.reshape(-1, self.columns)
        parts = [rows[:, : self.n], rows[:, self.n :]] if self.gate else [rows]
        padding = panels * width // len(parts) - self.n
        padded = [np.pad(part, ((0, 0), (0, padding))).reshape(len(rows), -1, isa.lanes) for part in parts]
        mixed = np.stack(padded, axis=2).reshape(len(rows), panels, width)
        if index == 2:
            return np.ascontiguousarray(mixed.reshape(-1), dtype=np.float32)
        cut = mixed.transpose(1, 0, 2)
        if self.precision == "bfloat16":
            return _pairs(cut)
        return strassen.pack(cut) if knobs["strassen"] else np.ascontiguousarray(cut, dtype=np.float32)

    def _panels(self, isa: Isa, knobs: Knobs) -> int:
        return ceil_div(self.n, self._panel_outputs(isa, knobs))

    def _panel_outputs(self, isa: Isa, knobs: Knobs) -> int:
        """Return the output columns of a full panel."""
        return int(knobs["vectors"]) * isa.lanes // (2 if self.gate else 1)

    # Knobs

    def knobs(self, isa: Isa) -> Knobs:
        """Choose the register tile with the least estimated work, then the loop order by what fits the cache."""
        tile = self._ranked_tiles(isa)[0]
        fewer = self._strassen_knobs(isa)
        if fewer and self.strassen_loops(isa, fewer[0]).cycles(isa.threads) < WORTH_SEVEN * self._time(isa, tile):
            return fewer[0]
        return self._complete(isa, *tile)

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Return the rule's choice, then other tiles by estimated work, and the other loop order of each."""
        best = self.knobs(isa)
        space = [best]
        for rows, vectors in self._ranked_tiles(isa):
            knobs = self._complete(isa, rows, vectors)
            for order in ("panels", "rows"):
                for k_block in dict.fromkeys((knobs["k_block"], self.steps)):
                    candidate = {**knobs, "order": order, "k_block": k_block}
                    if candidate not in space:
                        space.append(candidate)
        return space + [knobs for knobs in self._strassen_knobs(isa) if knobs not in space]

    def _strassen_knobs(self, isa: Isa) -> list[Knobs]:
        """List ways to run seven half products, least estimated time first; none for small products."""
        large = self.m >= SEVEN_FROM_ROWS and self.k >= SEVEN_FROM_K
        if not (large and isa.strassen and self.precision == "float32"):
            return []
        knobs: list[Knobs] = []
        for rows, vectors, chunks, groups in strassen.tilings(self.m, isa.threads, self._tiles(isa)):
            made = {**self._complete(isa, rows, vectors), "order": "panels", "k_block": self.steps}
            knobs.append({**made, "chunks": chunks, "groups": groups, "strassen": True})
        return sorted(knobs, key=lambda choice: self.strassen_loops(isa, choice).cycles(isa.threads))[:SEVEN_KNOBS]

    def strassen_loops(self, isa: Isa, knobs: Knobs) -> strassen.StrassenLoops:
        """Return the loop nest of the seven half products."""
        return strassen.StrassenLoops(
            vec=Vectors(isa.lanes),
            m=self.m,
            k=self.k,
            panels=self._panels(isa, knobs),
            vectors=int(knobs["vectors"]),
            rows=int(knobs["rows"]),
            chunks=int(knobs["chunks"]),
            groups=int(knobs["groups"]),
        )

    def _complete(self, isa: Isa, rows: int, vectors: int) -> dict[str, int | str | bool]:
        tiles = Split(self.m, rows).count
        panels = ceil_div(self.n, vectors * isa.lanes // (2 if self.gate else 1))
        a_bytes = self.m * self.steps * STEP_BYTES
        order = "panels" if a_bytes <= CACHE_BYTES or self.m < self.n // 4 else "rows"
        if order == "rows":
            chunk_tiles = max(1, CHUNK_BYTES // (rows * self.steps * STEP_BYTES))
            chunks = max(ceil_div(tiles, chunk_tiles), isa.threads)
        else:
            balanced = panels % isa.threads == 0 or panels >= 8 * isa.threads
            chunks = 1 if balanced else isa.threads
            order = "rows" if chunks > 1 and panels > 1 else "panels"  # threads have rows, as in the kernels beside it
        k_block = self.steps if self.steps <= K_BLOCK_FROM else Split(self.steps, K_BLOCK).small + 1
        return {
            "rows": rows,
            "vectors": vectors,
            "order": order,
            "chunks": min(chunks, tiles),
            "k_block": k_block,
            "strassen": False,
        }

    def _ranked_tiles(self, isa: Isa) -> list[tuple[int, int]]:
        """List register tiles, least estimated time first."""
        converted = self.precision == "bfloat16" and self.a_dtype != "bfloat16"  # to rows that do not compete
        competing = not converted and self.inputs[0].size_bytes // self.m % PAGE_BYTES == 0
        most = COMPETING_ROWS if competing else self.m
        tiles = dict.fromkeys((min(rows, most), vectors) for rows, vectors in self._tiles(isa))
        return sorted(tiles, key=lambda tile: self._time(isa, tile))

    def _time(self, isa: Isa, tile: tuple[int, int]) -> float:
        """Estimate the time of a call, in fused multiply-adds of full rate."""
        units = ceil_div(self.n, tile[1] * isa.lanes) * int(self._complete(isa, *tile)["chunks"])
        return self.steps * self._cycles(isa, *tile) * ceil_div(units, isa.threads) / units

    def _tiles(self, isa: Isa) -> list[tuple[int, int]]:
        """List register tiles that leave a register for each B vector and one for the broadcast."""
        widening = self.precision == "bfloat16" and not isa.bf16_dot
        free = isa.registers - 1 - (WIDENING_REGISTERS if widening else 0)
        widths = (2, 1) if widening and isa.registers < 32 else (3, 4, 2, 1)
        tiles = [(min((free - v) // v, 14), v) for v in widths]
        if isa.registers >= 32:
            tiles.insert(0, (8, 3))
        return [(min(rows, self.m), v) for rows, v in tiles if not (self.gate and v % 2)]

    def _cycles(self, isa: Isa, rows: int, vectors: int) -> float:
        """Estimate the cycles of one step of k over the whole output, in fused multiply-adds of full rate."""
        split = Split(self.m, rows)
        heights = {split.small + 1: split.longer, split.small: split.count - split.longer}
        all_vectors = ceil_div(self.n, isa.lanes) * (2 if self.gate else 1)
        widths = {vectors: all_vectors // vectors, all_vectors % vectors: 1}
        cycles = {
            (height, width): tiles * panels * max(height * width, height + width, 8) * (1 + 1 / (height * width))
            for height, tiles in heights.items()
            for width, panels in widths.items()
            if tiles and width and panels
        }
        return sum(cycles.values()) * (1 + 0.01 * len(cycles))  # each kind of tile is code to compile

    # Code

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the tiled product."""
        return build_function(self, isa, knobs, lambda *buffers: GemmWriter(self, isa, knobs, buffers).write())

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Multiply in float64, the operands rounded as `precision` says."""
        operands = [np.asarray(array, np.float64) for array in arrays]
        a, w = operands[:2]
        if self.a_dtype == "bfloat16":
            a = from_bfloat16_bits(arrays[0]).astype(np.float64)
        if self.precision == "bfloat16":
            a, w = round_to_bfloat16(a), round_to_bfloat16(w)
        offset = self.a_view.offset if self.a_view else 0
        out = self.scale * (a[:, offset : offset + self.k] @ w)
        if self.bias:
            out = out + operands[2]
        if self.activation:
            out = ACTIVATION_REFERENCES[self.activation](out)
        if self.gate:
            out = out[:, : self.n] * ACTIVATION_REFERENCES[self.gate](out[:, self.n :])
        return (out + operands[-1] if self.residual else out,)


def _pairs(panels_PKW: Array) -> Array:
    """Round panels `[P, K, W]` to bfloat16 and join neighbours along K: words `[P, K/2, W]`; an odd K gets a zero."""
    panels, k, width = panels_PKW.shape
    bits = bfloat16_bits(np.pad(panels_PKW, ((0, 0), (0, k % WORD), (0, 0))))
    halves = bits.reshape(panels, -1, WORD, width).astype(np.uint32)
    return np.ascontiguousarray(halves[:, :, 0] | halves[:, :, 1] << 16).view(np.int32)
