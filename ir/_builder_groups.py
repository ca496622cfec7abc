"""Groups of methods of `ir.builder.Builder`: mixing, routing and transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ir.ops.attention import Attention, Normaliser, Rope
from ir.ops.convolution import Conv, Padding, Pool
from ir.ops.indexing import DynamicUpdate, Gather, ScatterAdd, Take
from ir.ops.recurrence import Decay, Form, LinearScan, OuterScan
from ir.ops.sorting import TopK
from ir.ops.spectral import Fft, Irfft, LongConv, Rfft

if TYPE_CHECKING:
    from ir.builder import Tensor
    from ir.op import Op


class _Group:
    """What a group expects of the builder that it becomes part of."""

    if TYPE_CHECKING:

        def apply(self, op: Op, *operands: Tensor) -> Tensor: ...

        def apply_all(self, op: Op, *operands: Tensor) -> tuple[Tensor, ...]: ...


class Mixing(_Group):
    """Convolution, pooling, attention and recurrences."""

    def conv(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        strides: Sequence[int] | None = None,
        padding: Padding | None = None,
        dilation: Sequence[int] | None = None,
        groups: int = 1,
    ) -> Tensor:
        """Convolution, channels last; defaults are stride 1, no padding, no dilation."""
        axes = x.type.rank - 2
        ones = (1,) * axes
        op = Conv(tuple(strides or ones), padding or ((0, 0),) * axes, tuple(dilation or ones), groups)
        return self.apply(op, x, weight)

    def pool(self, x: Tensor, pooling: Pool) -> Tensor:
        """Average or maximum over windows."""
        return self.apply(pooling, x)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        causal: bool = False,
        window: int | None = None,
        alibi: tuple[float, ...] | None = None,
        offset: Tensor | None = None,
        bias: Tensor | None = None,
        normaliser: Normaliser = "softmax",
        shift: float | None = None,
        stretch: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Attention over `[B, T, H, K]` operands; the default scale is 1 / sqrt(K)."""
        op = Attention(
            scale=float(q.shape[-1]) ** -0.5 if scale is None else scale,
            causal=causal,
            window=window,
            alibi=alibi,
            has_offset=offset is not None,
            has_bias=bias is not None,
            normaliser=normaliser,
            shift=shift,
            stretch=stretch,
        )
        return self.apply(op, q, k, v, *(extra for extra in (offset, bias) if extra is not None))

    def rope(self, x: Tensor, *, base: float = 10000.0, offset: Tensor | None = None) -> Tensor:
        """Rotary position on `[B, T, H, K]`."""
        return self.apply(Rope(base, offset is not None), x, *([] if offset is None else [offset]))

    def linear_scan(self, a: Tensor, b: Tensor) -> Tensor:
        """s_t = a_t * s_{t-1} + b_t along axis 1."""
        return self.apply(LinearScan(), a, b)

    def outer_scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *gates: Tensor,
        decay: Decay = "none",
        scale: float = 1.0,
        beta: Tensor | None = None,
        state: Tensor | None = None,
        form: Form = "auto",
        chunk: int = 64,
    ) -> tuple[Tensor, Tensor]:
        """Matrix-state recurrence; returns the outputs and the last state.

        `gates` are what `decay` asks for; `beta` makes it the delta rule.
        """
        op = OuterScan(decay, scale, state is not None, form, chunk, beta is not None)
        extra = [operand for operand in (beta, state) if operand is not None]
        output, last = self.apply_all(op, q, k, v, *gates, *extra)
        return output, last


class Routing(_Group):
    """Order along the last axis, and reading and writing at positions that are data."""

    def take(self, table: Tensor, indices: Tensor) -> Tensor:
        """Rows of a table at int32 indices."""
        return self.apply(Take(), table, indices)

    def gather(self, x: Tensor, indices: Tensor, axis: int) -> Tensor:
        """Elements at int32 indices along an axis; indices of size 1 beside it serve every position."""
        return self.apply(Gather(axis), x, indices)

    def scatter_add(self, base: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
        """`base` with updates added at int32 indices along an axis."""
        return self.apply(ScatterAdd(axis), base, indices, updates)

    def dynamic_update(self, base: Tensor, update: Tensor, position: Tensor, axis: int) -> Tensor:
        """`base` with `update` written at a run-time position."""
        return self.apply(DynamicUpdate(axis), base, update, position)

    def top_k(self, x: Tensor, k: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
        """Values and positions of the k largest elements along the last axis, largest first, or of the smallest."""
        values, positions = self.apply_all(TopK(k, largest), x)
        return values, positions

    def sort(self, x: Tensor, *, descending: bool = False) -> tuple[Tensor, Tensor]:
        """Values in order along the last axis and where they were; equal ones keep their order."""
        return self.top_k(x, x.shape[-1], largest=descending)


class Spectra(_Group):
    """Fourier transforms; a complex tensor is a pair of real ones, real and imaginary part."""

    def fft(self, real: Tensor, imaginary: Tensor, axis: int, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Complex Fourier transform along an axis, or its inverse."""
        first, second = self.apply_all(Fft(axis, inverse), real, imaginary)
        return first, second

    def rfft(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Fourier transform of real numbers along an axis, at the frequencies 0 to n // 2."""
        real, imaginary = self.apply_all(Rfft(axis), x)
        return real, imaginary

    def irfft(self, real: Tensor, imaginary: Tensor, axis: int, length: int) -> Tensor:
        """Real numbers of a given length from their Fourier transform."""
        return self.apply(Irfft(axis, length), real, imaginary)

    def long_conv(self, x: Tensor, filter: Tensor) -> Tensor:
        """Causal convolution of each channel of `[B, T, C]` with its own filter `[L, C]`."""
        return self.apply(LongConv(), x, filter)
