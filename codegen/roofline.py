"""What this machine can do at best, measured on the spot: multiply-adds a second and bytes copied a second.

Both are small generated kernels, compiled by the same compiler as everything else: chains of multiply-adds that never
leave the registers, and a copy between two buffers far larger than any cache. Figures of kernels and models are set
against them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from codegen import _tvm
from codegen._tvm import KERNEL_ATTRIBUTE, Buffer, IRBuilder, PrimFunc
from codegen._tvm import tir_builder as T
from codegen.kernels.base import AVX2, Isa
from codegen.kernels.emit import Vectors, bind, parallel_block, serial
from codegen.measure import time_call
from codegen.targets.base import Target

_CHAINS: Final = 12  # latency times width of the multiply-add units, 8 to 10 on x86-64; AVX2 has registers for 12
_UNROLLED: Final = 8  # rounds of the chains in a loop step, so that counting costs nothing
_STEPS: Final = 4000
_COPY_BYTES: Final = 1 << 26  # several times the last-level cache of a desktop processor
_PIECES: Final = 64
_SAMPLES: Final = 7


@dataclass(frozen=True)
class Roofline:
    """Limits of the machine at a number of threads.

    Attributes:
        fma_peak_gflops: Float32 multiply-adds from registers, two operations each.
        copy_gbs: Bytes read and written by a large copy, 10^9 a second.
    """

    fma_peak_gflops: float
    copy_gbs: float


@dataclass(frozen=True)
class Probe:
    """The two kernels, ready to run in this process.

    Attributes:
        fma: Runs multiply-adds in the vector width that does most of them.
        fma_flops: Operations of one call.
        copy: Copies once.
        copy_bytes: Bytes that it reads and writes.
    """

    fma: Callable[[], object]
    fma_flops: int
    copy: Callable[[], object]
    copy_bytes: int

    def measure(self) -> Roofline:
        """Take the best of a few calls of each."""
        fastest = {call: min(time_call(call) for _ in range(_SAMPLES)) for call in (self.fma, self.copy)}
        return Roofline(self.fma_flops / fastest[self.fma] / 1e9, self.copy_bytes / fastest[self.copy] / 1e9)


def make_probe(target: Target) -> Probe:
    """Compile the kernels and load them into this process.

    Args:
        target: Processor and threads; where it has AVX-512, AVX2 is tried as well.
    """
    isas = [target.isa] + ([dataclasses.replace(AVX2, threads=target.threads)] if target.isa.lanes > AVX2.lanes else [])
    functions = {f"fma_{isa.lanes}": _write_fma(isa) for isa in isas} | {"copy": _write_copy(target.isa)}
    library = _tvm.compile_functions(functions, _tvm.Target(target.to_tvm()))
    best: tuple[float, Callable[[], object], int] | None = None
    for isa in isas:
        constants = _tvm.device_array(np.array([0.5, 1.0], np.float32))
        sums = _tvm.device_array(np.zeros((isa.threads, isa.lanes), np.float32))
        call, flops = _bound(library[f"fma_{isa.lanes}"], constants, sums), _fma_flops(isa)
        speed = flops / min(time_call(call) for _ in range(_SAMPLES))
        if best is None or speed > best[0]:
            best = speed, call, flops
    assert best is not None
    elements = _COPY_BYTES // 4
    source, copied = (_tvm.device_array(np.ones(elements, np.float32)) for _ in range(2))
    return Probe(best[1], best[2], _bound(library["copy"], source, copied), 2 * _COPY_BYTES)


def _bound(function: Any, *operands: Any) -> Callable[[], object]:
    return lambda: function(*operands)


def _fma_flops(isa: Isa) -> int:
    return 2 * isa.lanes * _CHAINS * _UNROLLED * _STEPS * isa.threads


def _function(shapes: tuple[tuple[int, ...], ...], write: Callable[..., None]) -> PrimFunc:
    with IRBuilder() as builder, T.prim_func(private=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, KERNEL_ATTRIBUTE: True})
        write(*(T.arg(f"x{i}", T.buffer(shape, "float32", layout=None)) for i, shape in enumerate(shapes)))
    return builder.get()


def _write_fma(isa: Isa) -> PrimFunc:
    """Each thread: `acc_i = acc_i * x + y` in independent chains, x and y from memory so that nothing is known."""

    def write(constants: Buffer, sums: Buffer) -> None:
        vec = Vectors(isa.lanes)
        with parallel_block(isa.threads) as thread:
            factor, addend = bind(vec.splat(constants[0])), bind(vec.splat(constants[1]))
            chains = [vec.register(float(i)) for i in range(_CHAINS)]
            with serial(0, _STEPS):
                for _ in range(_UNROLLED):
                    for chain in chains:
                        chain.set(chain.get() * factor + addend)
            total = chains[0].get()
            for chain in chains[1:]:
                total = total + chain.get()
            vec.store(sums, total, thread, 0)

    return _function(((2,), (isa.threads, isa.lanes)), write)


def _write_copy(isa: Isa) -> PrimFunc:
    """Each thread copies runs of vectors."""
    pieces = _PIECES if isa.threads > 1 else 1
    piece = _COPY_BYTES // 4 // pieces

    def write(source: Buffer, copied: Buffer) -> None:
        vec = Vectors(isa.lanes)
        with parallel_block(pieces) as index, serial(0, piece // isa.lanes) as step:
            place = index * piece + step * isa.lanes
            vec.store(copied, vec.load(source, place), place)

    return _function(((_COPY_BYTES // 4,), (_COPY_BYTES // 4,)), write)
