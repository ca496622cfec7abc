"""Small vocabulary for bfloat16 in TIR: rounding, storage, and dot products of pairs.

A bfloat16 number is the upper half of a float32. TVM's own bfloat16 type does not reach the vector instructions, so
here numbers are stored as uint16 and read two at a time as one int32 *word*: the even element in its lower half, the
odd one in its upper half. `dot` multiplies words with words and adds both products in float32.

With `Isa.bf16_dot` that is one instruction, which TVM does not know: it comes from LLVM IR imported into the function,
so what uses it stands inside `instructions`. Elsewhere shifts and fused multiply-adds do the same; only numbers below
2^-126, which the instruction takes as zero, and the last bits of a sum differ.

    words = Bfloat16(isa)
    with words.instructions():
        total.set(words.dot(total.get(), splat_int(a_words[row, k], isa.lanes), load_words(w_words, k, column, lanes)))
        store_vector(y, words.round(total.get()), row, column)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from codegen._tvm import Buffer, Expr, tirx
from codegen._tvm import tir_builder as T
from codegen.kernels.base import Isa
from codegen.kernels.emit import Index, bind
from codegen.kernels.vector_math import splat_int

WORD: Final = 2
"""Numbers in a word."""

_INFINITY_BITS: Final = 0x7F800000
_QUIET_NAN_BITS: Final = 0x7FC00000
_UPPER_HALF: Final = -0x10000
_ALL_BUT_SIGN: Final = 0x7FFFFFFF

_LLVM: Final = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define linkonce_odr <16 x float> @nas_bf16_dot(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) alwaysinline {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}

define linkonce_odr <16 x i16> @nas_bf16_round(<16 x float> %x) alwaysinline {
  %t = fptrunc <16 x float> %x to <16 x bfloat>
  %r = bitcast <16 x bfloat> %t to <16 x i16>
  ret <16 x i16> %r
}
"""


@dataclass(frozen=True)
class Bfloat16:
    """Operations on vectors of `isa.lanes` float32 numbers or words.

    Attributes:
        isa: Processor; decides between its instructions and what replaces them.
    """

    isa: Isa

    @property
    def lanes(self) -> int:
        """Float32 numbers, or words, in a vector."""
        return self.isa.lanes

    @contextmanager
    def instructions(self) -> Iterator[None]:
        """Make the instructions known inside; stands around the whole body of a function."""
        if not self.isa.bf16_dot:
            yield
            return
        with T.attr(tirx.IntImm("int32", 0), "pragma_import_llvm", _LLVM):
            yield

    def round(self, x: Expr) -> Expr:
        """Round float32 numbers to bfloat16, ties to even: a uint16 vector of the same lanes."""
        if self.isa.bf16_dot:
            return T.call_pure_extern(f"uint16x{self.lanes}", "nas_bf16_round", x)
        return (self._rounded_bits(x) >> self._bits(16)).astype(f"uint16x{self.lanes}")

    def round_words(self, x: Expr) -> Expr:
        """Round neighbouring numbers into words: an int32 vector of half the lanes."""
        return tirx.reinterpret(f"int32x{self.lanes // WORD}", self.round(x))

    def round_numbers(self, x: Expr) -> Expr:
        """Round float32 numbers to bfloat16 and return them as float32."""
        if self.isa.bf16_dot:
            return self.numbers(self.round(x))
        return self._numbers(self._rounded_bits(x) & self._bits(_UPPER_HALF))

    def pair(self, even: Expr, odd: Expr) -> Expr:
        """Round two vectors and make lane i of both the word of lane i: an int32 vector of the same lanes."""
        if self.isa.bf16_dot:
            words = f"int32x{self.lanes}"
            return self.round(even).astype(words) | (self.round(odd).astype(words) << self._bits(16))
        lower = (self._rounded_bits(even) >> self._bits(16)) & self._bits(0xFFFF)
        return lower | (self._rounded_bits(odd) & self._bits(_UPPER_HALF))

    def numbers(self, bits: Expr) -> Expr:
        """Return the float32 numbers of a uint16 vector."""
        return self._numbers(bits.astype(f"int32x{self.lanes}") << self._bits(16))

    def even(self, words: Expr) -> Expr:
        """Return the float32 numbers in the lower halves of words."""
        return self._numbers(words << self._bits(16))

    def odd(self, words: Expr) -> Expr:
        """Return the float32 numbers in the upper halves of words."""
        return self._numbers(words & self._bits(_UPPER_HALF))

    def dot(self, total: Expr, a: Expr, b: Expr) -> Expr:
        """Return total + even(a) * even(b) + odd(a) * odd(b), lane by lane, in float32."""
        if self.isa.bf16_dot:
            return T.call_pure_extern(f"float32x{self.lanes}", "nas_bf16_dot", total, a, b)
        return total + self.even(a) * self.even(b) + self.odd(a) * self.odd(b)

    def _rounded_bits(self, x: Expr) -> Expr:
        """Bits of float32 numbers plus half of the last place that stays; the lower halves are left over."""
        bits = bind(tirx.reinterpret(f"int32x{self.lanes}", x))
        last_kept = (bits >> self._bits(16)) & self._bits(1)
        is_number = (bits & self._bits(_ALL_BUT_SIGN)) <= self._bits(_INFINITY_BITS)
        return bind(tirx.Select(is_number, bits + self._bits(0x7FFF) + last_kept, self._bits(_QUIET_NAN_BITS)))

    def _bits(self, value: int) -> Expr:
        return splat_int(value, self.lanes)

    def _numbers(self, bits: Expr) -> Expr:
        return tirx.reinterpret(f"float32x{self.lanes}", bits)


def words_of(buffer: Buffer) -> Buffer:
    """Return bfloat16 storage seen as words; the last dimension is even."""
    *outer, width = (int(size) for size in buffer.shape)
    return T.decl_buffer((*outer, width // WORD), "int32", data=buffer.data, layout=None)


def load_vector(buffer: Buffer, lanes: int, *index: Index, live: int | None = None) -> Expr:
    """Load consecutive elements of the last dimension, of whatever type; lanes from `live` on read as zero."""
    *outer, column = index
    ramp = tirx.Ramp(column, 1, lanes)
    if live is None or live >= lanes:
        return buffer[(*outer, ramp)]
    mask = tirx.Ramp(0, 1, lanes) < splat_int(live, lanes)
    loaded = T.masked_load(f"{buffer.dtype}x{lanes}", buffer, *outer, ramp, mask)
    return tirx.Select(mask, loaded, tirx.Broadcast(tirx.const(0, buffer.dtype), lanes))


def store_vector(buffer: Buffer, value: Expr, lanes: int, *index: Index, live: Index | None = None) -> None:
    """Store consecutive elements of the last dimension, of whatever type; from lane `live` on memory is left alone."""
    *outer, column = index
    ramp = tirx.Ramp(column, 1, lanes)
    if live is None or (isinstance(live, int) and live >= lanes):
        T.buffer_store(buffer, value, [*outer, ramp])
        return
    if isinstance(live, int) and live == 1:  # LLVM 22 makes a wider scalar store of a narrowing masked one
        T.buffer_store(buffer, tirx.Shuffle([value], [0]), [*outer, column])
        return
    mask = tirx.Ramp(0, 1, lanes) < splat_int(live, lanes)
    T.evaluate(T.masked_store(buffer, value, *outer, ramp, mask))
