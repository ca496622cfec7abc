"""Functions of a model that start kernels in CUDA C++: what they are compiled from, and how they call it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from codegen._tvm import PrimFunc
from codegen._tvm import tir_builder as T
from codegen.gpu.cuda.kernels import CudaKernel
from codegen.gpu.emit import Operand, build_function
from codegen.kernels.base import Kernel, View

CODE_ATTRIBUTE: Final = "nas.cuda_code"
"""Function attribute: the kernels in CUDA C++ that the function starts, as JSON; see `codegen.gpu.cuda.linking`."""

MOST_ROWS: Final = 65535
"""Blocks of a grid along y."""
# Shared memory of a block in KB: CUDA programming guide, technical specifications per compute capability.
_SHARED_KB: Final = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_120": 99, "sm_120a": 99}
_USUAL_SHARED_KB: Final = 227


@dataclass(frozen=True)
class Launch:
    """One start of an entry, of which all arguments are pointers.

    Attributes:
        site: The entry; its arguments are called as the operands or the workspace.
        grid: Blocks along x and y.
    """

    site: CudaKernel
    grid: tuple[int, int]


@dataclass(frozen=True)
class Workspace:
    """Memory that a function needs between its launches.

    Attributes:
        name: As the arguments call it.
        size: Numbers in float32.
    """

    name: str
    size: int


def write_launches(
    kernel: Kernel,
    names: Sequence[str],
    launches: Sequence[Launch],
    *,
    packed: Sequence[tuple[tuple[int, ...], str] | None] = (),
    workspace: Workspace | None = None,
) -> PrimFunc:
    """Write the function that starts kernels one after the other.

    Args:
        kernel: The workload.
        names: What the arguments of the entries call its operands, inputs and then outputs.
        launches: What is started.
        packed: Shape and dtype of inputs in another layout than the workload's own, by position.
        workspace: Memory beside the operands.
    """

    def write(*operands: Operand) -> None:
        pointers: dict[str, Any] = {name: operand.argument.data for name, operand in zip(names, operands, strict=True)}
        if workspace is not None:
            pointers[workspace.name] = T.alloc_buffer((workspace.size,), "float32", layout=None).data
        for launch in launches:
            site = launch.site
            given = [pointers[name] for _, name in site.arguments]
            T.evaluate(T.call_packed(site.entry, *given, *launch.grid, site.threads, site.shared_bytes))

    described = [
        {"header": site.header, "entry": site.entry, "text": site.text, "pointers": len(site.arguments)}
        for site in (launch.site for launch in launches)
    ]
    return build_function(kernel, write, packed).with_attr(CODE_ATTRIBUTE, json.dumps(described))


def named_apart(site: CudaKernel) -> CudaKernel:
    """Return an entry with a name that no other instance has."""
    digest = hashlib.sha256(repr((site.call, site.operands)).encode()).hexdigest()[:10]
    return replace(site, entry=f"{site.entry}_{digest}")


def most_shared_bytes(architecture: str) -> int:
    """Return the shared memory that a block can have."""
    return _SHARED_KB.get(architecture, _USUAL_SHARED_KB) * 1024


def literal(value: float) -> str:
    """Return a float32 of C++."""
    return f"{float(value).hex()}f"


def strides(length: int, view: View, size: int) -> str:
    """Return the strides of an operand: of sequences of some tokens, of tokens, of heads of some features."""
    return f"nas::Strides{{{length * view.width}, {view.width}, {size}}}"


def gate_strides(length: int, view: View, size: int) -> str:
    """Return the same for decays, of features too."""
    return f"nas::GateStrides{{{length * view.width}, {view.width}, {size}, 1}}"


def head_constants(values: Sequence[float]) -> str:
    """Return numbers of the heads."""
    return f"nas::Constants<{len(values)}>{{{{{', '.join(map(literal, values))}}}}}"
