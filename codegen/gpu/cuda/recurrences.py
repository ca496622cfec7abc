"""Recurrences of models by chunks of 64 tokens on tensor cores: those with a matrix state and a decay that is no rule.

The graph keeps recurrences in float32, so every product is made of three of numbers of 11 bits: what comes out is as
near as sums of float32 in another order. Three launches: what each chunk adds, the states before the chunks, the
outputs. Few tokens, as in decoding, and other sizes of heads go the way of all devices, token by token.
"""

from __future__ import annotations

import math
from typing import Final

from codegen._tvm import PrimFunc
from codegen.gpu.cuda.kernels import CudaKernel
from codegen.gpu.cuda.sites import (
    MOST_ROWS,
    Launch,
    Workspace,
    gate_strides,
    head_constants,
    literal,
    most_shared_bytes,
    named_apart,
    strides,
    write_launches,
)
from codegen.kernels.base import Knobs, View
from codegen.kernels.recurrence import OuterScanKernel
from codegen.targets.base import Gpu

CHUNK: Final = 64
"""Tokens of a chunk."""
LEAST_STEPS: Final = 32
"""Tokens below which stepping through them is no slower."""
LARGEST_KEY: Final = 128
MOST_WORK_BYTES: Final = 1 << 29
"""Largest memory between the launches."""

_THREADS: Final = 128
_LARGEST_TILE: Final = 64  # columns of the values of a block: registers
_DECAYS: Final = {"none": "kNoDecay", "head": "kHeadDecay", "key": "kKeyDecay"}
_VECTOR: Final = 4  # elements of 16 bytes


def fits(kernel: OuterScanKernel, gpu: Gpu) -> bool:
    """Tell whether a recurrence has the form that the kernels take."""
    sized = kernel.dk % 16 == 0 and kernel.dk <= LARGEST_KEY and kernel.dv % 16 == 0
    aligned = all(view.width % _VECTOR == 0 and view.offset % _VECTOR == 0 for view in kernel.views[:3])
    many = kernel.t >= LEAST_STEPS and kernel.batch * kernel.heads <= MOST_ROWS and kernel.decay in _DECAYS
    held = many and sized and _shared_bytes(kernel, operands=2) <= most_shared_bytes(gpu.model)
    return held and aligned and 4 * workspace(kernel).size <= MOST_WORK_BYTES


def write_scan(kernel: OuterScanKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write the function that starts the kernels."""
    del gpu, knobs
    names = [*"qkv", *["g"] * kernel.has_gate, *["first"] * kernel.initial_state, "o", *["last"] * kernel.final_state]
    return write_launches(kernel, names, launches(kernel), workspace=workspace(kernel) if _has_states(kernel) else None)


def workspace(kernel: OuterScanKernel) -> Workspace:
    """Return the memory of the states before the chunks, and of what chunks keep of them."""
    return Workspace("work", kernel.batch * kernel.heads * _chunks(kernel) * kernel.dk * (kernel.dv + 1))


def launches(kernel: OuterScanKernel) -> list[Launch]:
    """Return the entries, everything but pointers fixed, and their grids; one where every state is zero."""
    before = [_states(kernel), _join(kernel)] if _has_states(kernel) else []
    return [*before, _outputs(kernel)]


def _states(kernel: OuterScanKernel) -> Launch:
    arguments = [("const float*", name) for name in ("k", "v", *["g"] * kernel.has_gate)]
    lengths, sizes = _strides(kernel), _shape(kernel)
    site = CudaKernel(
        entry=f"nas_scan_states_{kernel.dk}_{kernel.dv}",
        header="outer_scan.cuh",
        call=f"scan_states<{_template(kernel)}>",
        arguments=(*arguments, ("float*", "work")),
        threads=_THREADS,
        shared_bytes=_shared_bytes(kernel, operands=1),
        operands=(*_tensors(kernel)[1:], "work", sizes, *lengths[1:3], *_decay(kernel)),
    )
    return Launch(named_apart(site), _grid(kernel))


def _join(kernel: OuterScanKernel) -> Launch:
    given = [("const float*", "first")] * kernel.initial_state + [("float*", "last")] * kernel.final_state
    first, last = "first" if kernel.initial_state else "nullptr", "last" if kernel.final_state else "nullptr"
    site = CudaKernel(
        entry=f"nas_scan_join_{kernel.dk}_{kernel.dv}",
        header="outer_scan.cuh",
        call=f"scan_join<{kernel.dk}, {kernel.dv}>",
        arguments=(("float*", "work"), *given),
        threads=_THREADS,
        shared_bytes=0,
        operands=("work", first, last, str(_chunks(kernel))),
    )
    blocks = math.ceil(kernel.dk * kernel.dv / (_VECTOR * _THREADS))
    return Launch(named_apart(site), (blocks, kernel.batch * kernel.heads))


def _outputs(kernel: OuterScanKernel) -> Launch:
    names = [*"qkv", *["g"] * kernel.has_gate, *["work"] * _has_states(kernel)]
    work = "work" if _has_states(kernel) else "nullptr"
    o_strides = strides(kernel.t, View(kernel.heads * kernel.dv), kernel.dv)
    site = CudaKernel(
        entry=f"nas_scan_outputs_{kernel.dk}_{kernel.dv}",
        header="outer_scan.cuh",
        call=f"scan_outputs<{_template(kernel)}>",
        arguments=(*(("const float*", name) for name in names), ("float*", "o")),
        threads=_THREADS,
        shared_bytes=_shared_bytes(kernel, operands=2),
        operands=(*_tensors(kernel), work, "o", _shape(kernel), *_strides(kernel), o_strides, *_decay(kernel)),
    )
    return Launch(named_apart(site), _grid(kernel))


def _has_states(kernel: OuterScanKernel) -> bool:
    return _chunks(kernel) > 1 or kernel.initial_state or kernel.final_state


def _chunks(kernel: OuterScanKernel) -> int:
    return math.ceil(kernel.t / CHUNK)


def _tile(kernel: OuterScanKernel) -> int:
    """Columns of the values that a block takes."""
    return max(size for size in range(16, _LARGEST_TILE + 1, 16) if kernel.dv % size == 0)


def _grid(kernel: OuterScanKernel) -> tuple[int, int]:
    return (_chunks(kernel) * (kernel.dv // _tile(kernel)), kernel.batch * kernel.heads)


def _shared_bytes(kernel: OuterScanKernel, *, operands: int) -> int:
    """Bytes of a block: as many operands of the size of keys, one tile of values, the sums of the decays."""
    gates = {"none": 0, "head": CHUNK + 5, "key": CHUNK * (kernel.dk + 4) + 5 * kernel.dk}[kernel.decay]
    return 4 * (operands * CHUNK * (kernel.dk + 4) + CHUNK * (_tile(kernel) + 4) + gates)


def _template(kernel: OuterScanKernel) -> str:
    rates = len(kernel.constant_log_decay or (0.0,))
    return f"{kernel.dk}, {kernel.dv}, {_tile(kernel)}, nas::{_DECAYS[kernel.decay]}, {rates}"


def _tensors(kernel: OuterScanKernel) -> list[str]:
    found = [f"{name} + {view.offset}" for name, view in zip("qkvg", kernel.views, strict=True)]
    return found if kernel.has_gate else [*found[:3], "nullptr"]


def _shape(kernel: OuterScanKernel) -> str:
    return f"nas::ScanShape{{{kernel.t}, {kernel.heads}, {_chunks(kernel)}, {literal(kernel.scale)}}}"


def _strides(kernel: OuterScanKernel) -> list[str]:
    sizes = (kernel.dk, kernel.dk, kernel.dv)
    return [strides(kernel.t, view, size) for view, size in zip(kernel.views[:3], sizes, strict=True)]


def _decay(kernel: OuterScanKernel) -> tuple[str, str]:
    """Strides of the gates, constant decays of the heads."""
    size = kernel.dk if kernel.decay == "key" else 1
    return gate_strides(kernel.t, kernel.views[3], size), head_constants(kernel.constant_log_decay or (0.0,))
