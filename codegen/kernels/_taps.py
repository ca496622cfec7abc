"""Where the taps of a window lie: what convolutions and poolings have in common.

The last spatial axis is cut into strips of neighbouring outputs, each axis before it is walked one position at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from codegen._tvm import Expr, tirx
from codegen.kernels.emit import Index, ceil_div, serial
from ir.ops.convolution import Conv, Pool


@dataclass(frozen=True)
class Taps:
    """Sizes of a window operation, one entry a spatial axis.

    Attributes:
        sizes: Input.
        outputs: Output.
        window: Taps.
        strides: Input elements between two outputs.
        padding: Zeros before and after.
        dilation: Input elements between two taps.
    """

    sizes: tuple[int, ...]
    outputs: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @staticmethod
    def of(op: Conv | Pool, x: tuple[int, ...], y: tuple[int, ...], window: tuple[int, ...]) -> Taps:
        """The taps of an operation from `[B, *S, C]` to `[B, *S', O]`."""
        dilation = op.dilation if isinstance(op, Conv) else (1,) * len(window)
        return Taps(x[1:-1], y[1:-1], window, op.strides, op.padding, dilation)

    def first(self, output: Index, axis: int = -1) -> Index:
        """The input position of the first tap of an output."""
        return output * self.strides[axis] - self.padding[axis][0]

    def reach(self, outputs: int, axis: int = -1) -> int:
        """Input positions from the first tap of a run of outputs to the last, both included."""
        return (outputs - 1) * self.strides[axis] + (self.window[axis] - 1) * self.dilation[axis] + 1

    def is_inside(self, output: int, outputs: int) -> bool:
        """Whether no tap of a run of outputs along the last axis meets the padding."""
        first = output * self.strides[-1] - self.padding[-1][0]
        return first >= 0 and first + self.reach(outputs) <= self.sizes[-1]

    def inside(self, output: Index, axis: int) -> tuple[Index, Index]:
        """The taps from one number to below another that lie inside the input."""
        width, step = self.window[axis], self.dilation[axis]
        first = self.first(output, axis)
        if isinstance(first, int):
            low = min(max(ceil_div(-first, step), 0), width)
            return low, max(min(ceil_div(self.sizes[axis] - first, step), width), low)
        low = 0
        if self.padding[axis][0]:
            low = tirx.max(_positive_quotient(0 - first, step), tirx.const(0, "int32"))
        if self.first(self.outputs[axis] - 1, axis) + self.reach(1, axis) <= self.sizes[axis]:
            return low, width
        most = tirx.min(_positive_quotient(self.sizes[axis] - first, step), tirx.const(width, "int32"))
        return low, tirx.max(most, low if isinstance(low, Expr) else tirx.const(low, "int32"))

    @contextmanager
    def outer(self, batch: Index, place: Sequence[Index]) -> Iterator[tuple[Index, Index]]:
        """Run the body for each tap of all axes but the last that lies inside; gives its number and the input's row.

        Args:
            batch: Number of the sequence or image.
            place: Output position along these axes.
        """
        with ExitStack() as loops:
            number, row = 0, batch
            for axis, position in enumerate(place):
                alone = self.window[axis] == 1 and not any(self.padding[axis])
                tap: Index = 0 if alone else loops.enter_context(serial(*self.inside(position, axis)))
                number = number * self.window[axis] + tap
                row = row * self.sizes[axis] + (self.first(position, axis) + tap * self.dilation[axis])
            yield number, row


def _positive_quotient(total: Index, step: int) -> Index:
    """Divide, rounding up; of anything below zero, no more than zero."""
    if step == 1:
        return total
    return tirx.floordiv(tirx.max(total, tirx.const(0, "int32")) + (step - 1), tirx.const(step, "int32"))
