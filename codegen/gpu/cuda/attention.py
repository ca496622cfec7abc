"""Attention of models by kernels in CUDA C++: many queries on tensor cores, few of them with the keys shared out.

What the graph rounds to bfloat16 is multiplied as that; what it does not, as three products of numbers of 11 bits,
which keep what sums of float32 hold. Few queries, as in decoding, are read and computed in float32 whatever the
precision, as on processors: there the time is that of reading keys and values, and the kernels of all devices leave
most of a large GPU idle. Normalisers other than softmax, other sizes of heads and heads whose elements do not begin at
16 bytes go the way of all devices.
"""

from __future__ import annotations

import math
from typing import Final

from codegen._tvm import PrimFunc
from codegen.gpu.attention import FEW_QUERIES
from codegen.gpu.cuda.kernels import CudaKernel
from codegen.gpu.cuda.sites import (
    MOST_ROWS,
    Launch,
    Workspace,
    head_constants,
    literal,
    most_shared_bytes,
    named_apart,
    strides,
    write_launches,
)
from codegen.kernels.attention import AttentionKernel
from codegen.kernels.base import Knobs, View
from codegen.targets.base import Gpu

LARGEST_HEAD: Final = 128
"""Features of a head on tensor cores; a multiple of 16."""
LARGEST_FEW: Final = 256
"""Features of a head with few queries; a multiple of 16."""

_KEYS: Final = 64  # of a tile
_WARPS: Final = {"bfloat16": (8, 4, 2), "float32": (4, 2)}  # of a block on tensor cores, 16 queries each
_FEW_BLOCKS: Final = 100  # as for products
_DECODE_THREADS: Final = 128
_LANE_VECTORS: Final = 8  # vectors of four that a lane keeps of queries: registers
_WANTED_BLOCKS: Final = 264  # two for each multiprocessor of a large GPU
_LEAST_KEYS: Final = 64  # of a share: fewer take no longer than joining it
_MOST_SHARES: Final = 64
_VECTOR: Final = 4  # elements of 16 bytes


def fits_tensor_cores(kernel: AttentionKernel, gpu: Gpu) -> bool:
    """Tell whether an attention has the form that the kernel for many queries takes."""
    sized = kernel.head_dim % 16 == 0 and kernel.head_dim <= LARGEST_HEAD
    many = kernel.precision in _WARPS and kernel.q_len > FEW_QUERIES
    held = many and _shared_bytes(kernel) <= most_shared_bytes(gpu.model)
    return held and sized and _is_plain(kernel) and kernel.batch * kernel.heads <= MOST_ROWS


def fits_few_queries(kernel: AttentionKernel) -> bool:
    """Tell whether an attention has the form that the kernel for few queries takes."""
    sized = kernel.head_dim % 16 == 0 and kernel.head_dim <= LARGEST_FEW
    return kernel.q_len <= FEW_QUERIES and sized and _is_plain(kernel) and _row_parts(kernel) <= MOST_ROWS


def _is_plain(kernel: AttentionKernel) -> bool:
    """Whether it is a softmax over heads of one size that begin at 16 bytes."""
    aligned = all(view.width % _VECTOR == 0 and view.offset % _VECTOR == 0 for view in kernel.views)
    return kernel.normaliser == "softmax" and kernel.head_dim == kernel.value_dim and aligned


def write_many(kernel: AttentionKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write the function that starts the kernel for many queries."""
    del gpu, knobs
    return write_launches(kernel, _names(kernel), [many_launch(kernel)])


def write_few(kernel: AttentionKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write the function that starts the kernel for few queries, and joins the shares of the keys."""
    del gpu, knobs
    launches, shares = few_launches(kernel), key_shares(kernel)
    return write_launches(kernel, _names(kernel), launches, workspace=few_workspace(kernel) if shares > 1 else None)


def many_launch(kernel: AttentionKernel) -> Launch:
    """Return the entry for many queries, everything but pointers fixed, and its grid."""
    warps, exact = _warps(kernel), kernel.precision == "float32"
    family, kind = ("exact_attention", "") if exact else ("model_attention", "nas::Bf16, ")
    out = "float" if kernel.out_dtype == "float32" else "uint16_t"
    o_strides = strides(kernel.q_len, View(kernel.heads * kernel.value_dim), kernel.value_dim)
    q, k, v = _tensors(kernel)
    site = CudaKernel(
        entry=f"nas_{family}_{kernel.head_dim}",
        header=f"{family}.cuh",
        call=f"{family}<{kind}{kernel.head_dim}, {warps}, {out}, {_slope_count(kernel)}>",
        arguments=_arguments(kernel),
        threads=32 * warps,
        shared_bytes=_shared_bytes(kernel),
        operands=(q, k, v, *_optional(kernel), "o", _rules(kernel), *_all_strides(kernel), o_strides, *_scores(kernel)),
    )
    return Launch(named_apart(site), _many_grid(kernel, warps))


def few_launches(kernel: AttentionKernel) -> list[Launch]:
    """Return the entries for few queries, everything but pointers fixed, and their grids."""
    shares, head = key_shares(kernel), kernel.head_dim
    out = "float" if kernel.out_dtype == "float32" else "uint16_t"
    lanes, rows = _lanes(head), _rows(kernel)
    joined = shares > 1
    parts = ("float*", "parts")
    q, k, v = _tensors(kernel)
    tensors = [argument for argument in _arguments(kernel) if not (joined and argument[1] == "o")]
    first = CudaKernel(
        entry=f"nas_decode_attention_{head}",
        header="decode_attention.cuh",
        call=f"decode_attention<{head}, {lanes}, {rows}, {out}, {_slope_count(kernel)}>",
        arguments=(*tensors, *([parts] if joined else [])),
        threads=_DECODE_THREADS,
        shared_bytes=_DECODE_THREADS // lanes * rows * (head + 2) * 4,
        operands=(
            *(q, k, v, *_optional(kernel), "parts" if joined else "nullptr"),
            *(f"({out}*)nullptr" if joined else "o", _rules(kernel), *_all_strides(kernel), *_scores(kernel)),
        ),
    )
    launches = [Launch(named_apart(first), (shares, _row_parts(kernel)))]
    if joined:
        second = CudaKernel(
            entry=f"nas_decode_join_{head}",
            header="decode_attention.cuh",
            call=f"decode_join_shares<{head}, {out}>",
            arguments=(("const float*", "parts"), (f"{out}*", "o")),
            threads=_DECODE_THREADS,
            shared_bytes=0,
            operands=("parts", "o", str(shares)),
        )
        launches.append(Launch(named_apart(second), (kernel.batch * kernel.q_len * kernel.heads, 1)))
    return launches


def few_workspace(kernel: AttentionKernel) -> Workspace:
    """Return the memory of the shares: maximum, sum and mixed values of each row."""
    rows = kernel.batch * kernel.q_len * kernel.heads
    return Workspace("parts", rows * key_shares(kernel) * (kernel.head_dim + 2))


def key_shares(kernel: AttentionKernel) -> int:
    """Return how many blocks share the keys of a sequence, so that there are enough blocks."""
    seen = kernel.kv_len
    if kernel.window is not None:
        seen = min(seen, kernel.window * (1 if kernel.causal else 2) + kernel.q_len)
    return max(1, min(_MOST_SHARES, _WANTED_BLOCKS // _row_parts(kernel), math.ceil(seen / _LEAST_KEYS)))


def _lanes(head: int) -> int:
    """Lanes that take a key: the largest power of two whose vectors of four make up the head."""
    return min(32, math.gcd(head // _VECTOR, 32))


def _rows(kernel: AttentionKernel) -> int:
    """Rows of a block: as many of those that read one head of keys as registers hold, in even parts."""
    rows = kernel.heads // kernel.kv_heads * kernel.q_len
    most = max(1, _LANE_VECTORS * _VECTOR * _lanes(kernel.head_dim) // kernel.head_dim)
    return math.ceil(rows / math.ceil(rows / most))


def _row_parts(kernel: AttentionKernel) -> int:
    rows = kernel.heads // kernel.kv_heads * kernel.q_len
    return kernel.batch * kernel.kv_heads * math.ceil(rows / _rows(kernel))


def _many_grid(kernel: AttentionKernel, warps: int) -> tuple[int, int]:
    return (math.ceil(kernel.q_len / (16 * warps)), kernel.batch * kernel.heads)


def _warps(kernel: AttentionKernel) -> int:
    """Warps of a block: as many as leave enough blocks."""
    choices = _WARPS[kernel.precision]
    return next((warps for warps in choices if math.prod(_many_grid(kernel, warps)) >= _FEW_BLOCKS), choices[-1])


def _shared_bytes(kernel: AttentionKernel) -> int:
    """Bytes of a tile of keys and one of values, rounded and as they come; in float32 as they come, and queries."""
    head = kernel.head_dim
    if kernel.precision == "float32":
        return (16 * _warps(kernel) + 2 * _KEYS) * (head + 4) * 4
    return 2 * _KEYS * (head + 8) * 2 + 2 * _KEYS * head * 4


def _names(kernel: AttentionKernel) -> list[str]:
    return [name for _, name in _arguments(kernel)]


def _arguments(kernel: AttentionKernel) -> tuple[tuple[str, str], ...]:
    out = "float*" if kernel.out_dtype == "float32" else "uint16_t*"
    given = [("const float*", name) for name in "qkv"]
    given += [("const int*", "offset")] * kernel.offset + [("const float*", "bias")] * (kernel.bias_shape is not None)
    return (*given, (out, "o"))


def _optional(kernel: AttentionKernel) -> tuple[str, str]:
    return "offset" if kernel.offset else "nullptr", "bias" if kernel.bias_shape else "nullptr"


def _tensors(kernel: AttentionKernel) -> list[str]:
    return [f"{name} + {view.offset}" for name, view in zip("qkv", kernel.views, strict=True)]


def _rules(kernel: AttentionKernel) -> str:
    sizes = (kernel.q_len, kernel.kv_len, kernel.heads, kernel.kv_heads)
    rest = (literal(kernel.scale), str(kernel.causal).lower(), kernel.window or 0)
    return f"nas::AttentionRules{{{', '.join(map(str, (*sizes, *rest)))}}}"


def _all_strides(kernel: AttentionKernel) -> list[str]:
    lengths = (kernel.q_len, kernel.kv_len, kernel.kv_len)
    return [strides(length, view, kernel.head_dim) for length, view in zip(lengths, kernel.views, strict=True)]


def _slope_count(kernel: AttentionKernel) -> int:
    return len(kernel.alibi_slopes or (0.0,))


def _scores(kernel: AttentionKernel) -> tuple[str, str]:
    """Strides of the bias, slopes of the heads."""
    steps, step = [0, 0, 0, 0], 1
    for axis in (3, 2, 1, 0) if kernel.bias_shape else ():
        size = (kernel.bias_shape or ())[axis]
        steps[axis], step = (step if size > 1 else 0), step * size
    return f"nas::BiasStrides{{{', '.join(map(str, steps))}}}", head_constants(kernel.alibi_slopes or (0.0,))
