"""Small vocabulary for writing kernels of graphics processors: launches, shared and private memory, reductions.

A kernel is one launch: a grid of work-groups along one axis, each of some threads along one axis. Names that
`codegen.kernels.vector_math` gives to values are private to a thread here, so its functions serve unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from codegen._tvm import Buffer, Expr, IRBuilder, PrimFunc, tirx
from codegen._tvm import tir_builder as T
from codegen.kernels.base import Kernel, storage_dtype
from codegen.kernels.vector_math import names_in
from ir.types import TensorType

Index = int | Expr

BLOCK: Final = 256
"""Threads of a work-group where each has an element of its own: what every maker's device can start."""

_OPERANDS: ContextVar[Sequence[Operand]] = ContextVar("operands", default=())


@dataclass
class Operand:
    """An operand as one dimension of numbers; what is stored as bfloat16 is read and written as float32.

    Attributes:
        type: Logical type.
        argument: Its memory in its own shape.
        buffer: The same seen as one dimension; known inside a launch.
    """

    type: TensorType
    argument: Buffer
    buffer: Any = None

    def flatten(self) -> None:
        """Look at the memory as one dimension from here on."""
        size = math.prod(int(size) for size in self.argument.shape)
        self.buffer = T.decl_buffer((size,), self.argument.dtype, data=self.argument.data, layout=None)

    def __getitem__(self, place: Index) -> Expr:
        """Return the element at a row-major offset."""
        value = self.buffer[place]
        return from_bfloat16(value) if self.type.dtype == "bfloat16" else value

    def put(self, value: Expr, place: Index) -> None:
        """Store an element."""
        T.buffer_store(self.buffer, to_bfloat16(value) if self.type.dtype == "bfloat16" else value, [place])


def build_function(
    kernel: Kernel, write: Callable[..., None], packed: Sequence[tuple[tuple[int, ...], str] | None] = ()
) -> PrimFunc:
    """Wrap `write(*operands)`, the body over the kernel's inputs and outputs, into a private scheduled function.

    Args:
        kernel: The workload.
        write: Writes one launch.
        packed: Shape and dtype of inputs that come in another layout than the kernel's own, by position.
    """
    kinds = [*kernel.inputs, *kernel.outputs]
    names = [f"x{number}" for number in range(len(kernel.inputs))] + [f"y{n}" for n in range(len(kernel.outputs))]
    stored = [(kind.shape, storage_dtype(kind.dtype)) for kind in kinds]
    for number, other in enumerate(packed):
        stored[number] = other or stored[number]
    with names_in("local"), IRBuilder() as builder, T.prim_func(private=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        buffers = [
            T.arg(name, T.buffer(shape, dtype, layout=None)) for name, (shape, dtype) in zip(names, stored, strict=True)
        ]
        operands = [Operand(kind, buffer) for kind, buffer in zip(kinds, buffers, strict=True)]
        token = _OPERANDS.set(operands)
        try:
            write(*operands)
        finally:
            _OPERANDS.reset(token)
    return builder.get()


@contextmanager
def launch(groups: int, threads: int) -> Iterator[tuple[Expr, Expr]]:
    """Run the body in every thread of every work-group; gives their numbers."""
    with T.launch_thread("blockIdx.x", groups) as group, T.launch_thread("threadIdx.x", threads) as thread:
        for operand in _OPERANDS.get():
            operand.flatten()
        yield group, thread


@contextmanager
def each(total: int, threads: int = BLOCK) -> Iterator[Expr]:
    """Run the body in a thread for each number below `total`."""
    threads = min(threads, max(total, 1))
    groups = -(-total // threads)
    with launch(groups, threads) as (group, thread):
        number = group * threads + thread if groups > 1 else thread
        if groups * threads == total:
            yield number
        else:
            with branch(number < total):
                yield number


@contextmanager
def branch(condition: Expr) -> Iterator[None]:
    """Run the body where the condition holds."""
    with T.If(condition), T.Then():
        yield


@contextmanager
def strided(thread: Expr, threads: int, total: int) -> Iterator[Expr]:
    """Share the numbers below `total` out to the threads of a work-group, neighbours to neighbours."""
    rounds = -(-total // threads)
    with T.serial(0, rounds) as turn:
        number = turn * threads + thread
        if rounds * threads == total:
            yield number
        else:
            with branch(number < total):
                yield number


def serial(start: Index, stop: Index) -> Any:
    """Return the frame of a sequential loop."""
    return T.serial(start, stop)


def unrolled(stop: int) -> Any:
    """Return the frame of a loop that the device's compiler is asked to write out."""
    return T.unroll(0, stop)


def shared(size: int, dtype: str = "float32") -> Buffer:
    """Return memory that the threads of a work-group share."""
    return T.alloc_buffer((size,), dtype, scope="shared", layout=None)


def private(size: int, value: float | None = None, dtype: str = "float32") -> Buffer:
    """Return memory of one thread, set to a value if one is given."""
    made = T.alloc_buffer((size,), dtype, scope="local", layout=None)
    if value is not None:
        with unrolled(size) as place:
            put(made, number(value, dtype), place)
    return made


def put(buffer: Buffer, value: Expr, place: Index) -> None:
    """Store one element."""
    T.buffer_store(buffer, value, [place])


def add_to(buffer: Buffer, value: Expr, place: Index) -> None:
    """Add to one element."""
    T.buffer_store(buffer, buffer[place] + value, [place])


def bind(value: Expr) -> Expr:
    """Name an integer at this place of the program."""
    return T.Bind(value) if isinstance(value, Expr) else value


def barrier() -> None:
    """Wait until every thread of the work-group is here and sees what the others wrote to shared memory."""
    T.evaluate(T.tvm_storage_sync("shared"))


def number(value: float, dtype: str = "float32") -> Expr:
    """Return a literal."""
    return tirx.const(value, dtype)


def guarded(condition: Expr | bool, value: Callable[[], Expr], otherwise: float = 0.0) -> Expr:
    """Return a value that is only computed where a condition holds, else a number."""
    if isinstance(condition, bool):
        return value() if condition else number(otherwise)
    return tirx.if_then_else(condition, value(), number(otherwise))


def both(*conditions: Expr | bool) -> Expr | bool:
    """Return whether all conditions hold."""
    total: Expr | bool = True
    for condition in conditions:
        if condition is False or total is False:
            return False
        if condition is not True:
            total = condition if total is True else tirx.And(total, condition)
    return total


def reduce_threads(
    partial: Expr, thread: Expr, threads: int, combine: Callable[[Expr, Expr], Expr], area: Buffer, base: Index = 0
) -> Expr:
    """Combine one number of each of a power of two of neighbouring threads; all of a work-group come here together.

    Args:
        partial: The thread's own number.
        thread: The thread, counted from the first of its neighbours.
        threads: How many neighbours there are.
        combine: Joins two numbers.
        area: Shared memory with a place for each thread.
        base: Place of the first neighbour.

    Returns:
        The total, which every neighbour sees.
    """
    put(area, partial, base + thread)
    barrier()
    distance = threads // 2
    while distance:
        with branch(thread < distance):
            put(area, combine(area[base + thread], area[base + thread + distance]), base + thread)
        barrier()
        distance //= 2
    total = private(1)
    put(total, area[base], 0)
    barrier()  # the area may be written again
    return total[0]


def from_bfloat16(bits: Expr) -> Expr:
    """Return the float32 that bfloat16 bits stand for."""
    return tirx.reinterpret("float32", bits.astype("uint32") << tirx.const(16, "uint32"))


def to_bfloat16(value: Expr) -> Expr:
    """Return the bits of the bfloat16 nearest to a float32, ties to even."""
    return _rounded_bits(value).astype("uint16")


def round_bfloat16(value: Expr) -> Expr:
    """Return the bfloat16 nearest to a float32, as float32."""
    return tirx.reinterpret("float32", _rounded_bits(value) << tirx.const(16, "uint32"))


def _rounded_bits(value: Expr) -> Expr:
    sixteen = tirx.const(16, "uint32")
    bits = tirx.reinterpret("uint32", value)
    odd = (bits >> sixteen) & tirx.const(1, "uint32")
    return (bits + (odd + tirx.const(0x7FFF, "uint32"))) >> sixteen
