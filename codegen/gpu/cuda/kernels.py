"""Kernels for tensor cores, written in CUDA C++ under `sources/`: which there are, their entry points, how to launch.

Each function here describes one instance of a template: the text that the compiler gets and the geometry of a launch.
They take operands in bfloat16 or float16 and add in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from codegen.gpu.cuda.wgmma import wgmma
from ir.errors import InputError

TYPES: Final = {"bfloat16": "Bf16", "float16": "Fp16"}
"""Element types of operands, and what the sources call them."""
ACTIVATIONS: Final = {"identity": "kIdentity", "relu": "kRelu", "gelu": "kGelu", "silu": "kSilu"}
"""Functions that a product may end in; `gelu` is the exact one."""
HEAD_SIZES: Final = (64, 128)
"""Features of a head that attention and recurrences are there for."""

_TENSOR_MAP: Final = "const __grid_constant__ nas::TensorMap"
_STRIDES: Final = "nas::Strides"
_GATE_STRIDES: Final = "nas::GateStrides"
_GEMM_STAGES: Final = 4
_FEW_BLOCKS: Final = 100
"""Blocks below which smaller tiles are better: GPUs of this kind have 108 multiprocessors and more."""
_QUERIES: Final = 128
_CHUNK: Final = 64


@dataclass(frozen=True)
class GemmTile:
    """What a block of a product makes: `rows` x `columns` in steps of `depth`, by `down` x `across` warps."""

    rows: int
    columns: int
    depth: int
    down: int
    across: int

    @property
    def text(self) -> str:
        """Return the type in the sources."""
        return f"nas::GemmTile<{self.rows}, {self.columns}, {self.depth}, {self.down}, {self.across}>"

    @property
    def shared_bytes(self) -> int:
        """Bytes of a block's buffers."""
        return _GEMM_STAGES * (self.rows + self.columns) * (self.depth + 8) * 2

    def grid(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Return the blocks that make a product."""
        return (math.ceil(columns / self.columns), math.ceil(rows / self.rows), 1)


GEMM_TILES: Final = (GemmTile(128, 128, 32, 2, 4), GemmTile(64, 64, 64, 2, 2), GemmTile(32, 32, 64, 2, 2))
"""Largest first: the larger, the fewer bytes a product reads for an operation, and the fewer blocks share it."""


def gemm_tile(rows: int, columns: int) -> GemmTile:
    """Return the largest tile that gives every multiprocessor a block, else the smallest."""
    fitting = (tile for tile in GEMM_TILES if math.prod(tile.grid(rows, columns)) >= _FEW_BLOCKS)
    return next(fitting, GEMM_TILES[-1])


@dataclass(frozen=True)
class CudaKernel:
    """One entry point.

    Attributes:
        entry: Its name in the compiled module.
        header: File of `sources` with the template.
        call: The template's instance, as the entry calls it.
        arguments: Type and name of each argument, in order.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block; above 48 KB the function's attribute must be raised first.
        preamble: Text between the header and the entry.
        architecture: The least architecture; one that ends in `a` runs on nothing else.
        operands: What the template is called with, where that is not the arguments as they are.
    """

    entry: str
    header: str
    call: str
    arguments: tuple[tuple[str, str], ...]
    threads: int
    shared_bytes: int
    preamble: str = ""
    architecture: str = "sm_80"
    operands: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Return the text of a translation unit with this entry alone."""
        return f'#include "{self.header}"\n\n{self.preamble}{self.text}'

    @property
    def text(self) -> str:
        """Return the text of the entry."""
        arguments = ", ".join(f"{kind} {name}" for kind, name in self.arguments)
        operands = ", ".join(self.operands or (name for _, name in self.arguments))
        bounds = f"__launch_bounds__({self.threads}{self._blocks})"
        head = f'extern "C" __global__ void {bounds} {self.entry}({arguments})'
        return f"{head} {{\n  nas::{self.call}({operands});\n}}\n"

    @property
    def _blocks(self) -> str:
        """A cap on registers, without which warpgroups cannot trade them."""
        return ", 1" if self.architecture.endswith("a") else ""


def gemm(
    dtype: str = "bfloat16",
    *,
    activation: str = "identity",
    out: str | None = None,
    tile: GemmTile = GEMM_TILES[0],
) -> CudaKernel:
    """Describe `c[M, N] = activation(a[M, K] w[N, K]^T + bias[N]) + residual[M, N]`; N and K are multiples of 8.

    Args:
        dtype: Type of a and w.
        activation: Key of `ACTIVATIONS`.
        out: Type of c and of the residual: that of a, or `float32`.
        tile: What a block makes; `tile.grid` is the grid.
    """
    out = out or dtype
    made = "float" if out == "float32" else "uint16_t"
    operand = "const uint16_t*"
    pointers = ((operand, "a"), (operand, "w"), ("const float*", "bias"), (f"const {made}*", "residual"))
    sizes = (("int", "rows"), ("int", "columns"), ("int", "depth"))
    return CudaKernel(
        entry=f"nas_gemm_{dtype}_{activation}_{out}_{tile.rows}x{tile.columns}",
        header="gemm.cuh",
        call=f"gemm<nas::{_type(dtype)}, nas::{ACTIVATIONS[activation]}, {made}, {tile.text}>",
        arguments=(*pointers, (f"{made}*", "c"), *sizes),
        threads=32 * tile.down * tile.across,
        shared_bytes=tile.shared_bytes,
    )


def hopper_gemm(dtype: str = "bfloat16", *, activation: str = "identity", out: str | None = None) -> CudaKernel:
    """Describe the product of `gemm` by warpgroups and bulk copies: the first two operands are tensor maps.

    Both maps are of two dimensions, [depth, rows], with boxes of [64, 128] for a and [64, 256] for w, swizzled by 128
    bytes. The grid is any number of blocks, best one a multiprocessor.
    """
    plain = gemm(dtype, activation=activation, out=out)
    made = "float" if out == "float32" else "uint16_t"
    kind = _type(dtype)
    return CudaKernel(
        entry=f"nas_hopper_gemm_{dtype}_{activation}_{out or dtype}",
        header="hopper_gemm.cuh",
        call=f"hopper_gemm<nas::{kind}, nas::{ACTIVATIONS[activation]}, {made}>",
        arguments=((_TENSOR_MAP, "a"), (_TENSOR_MAP, "w"), *plain.arguments[2:]),
        threads=384,
        shared_bytes=4 * ((128 + 256) * 64 * 2 + 16),
        preamble=wgmma(kind, 256, transposed=False),
        architecture="sm_90a",
    )


def attention(dtype: str = "bfloat16", *, head: int, causal: bool) -> CudaKernel:
    """Describe `o = softmax(scale q k^T) v` for heads of 64 or 128 features, any lengths, shared heads of keys."""
    _check_heads(head)
    stride = head + 8
    tensors = tuple(("const uint16_t*", name) for name in "qkv")
    sizes = tuple(("int", name) for name in ("queries", "keys", "heads", "key_heads"))
    strides = tuple((_STRIDES, f"{name}_strides") for name in "qkvo")
    return CudaKernel(
        entry=f"nas_attention_{dtype}_{head}{'_causal' if causal else ''}",
        header="attention.cuh",
        call=f"attention<nas::{_type(dtype)}, {head}, {str(causal).lower()}>",
        arguments=(*tensors, ("uint16_t*", "o"), *sizes, ("float", "scale"), *strides),
        threads=256,
        shared_bytes=(_QUERIES + 4 * 64) * stride * 2,
    )


def hopper_attention(dtype: str = "bfloat16", *, causal: bool) -> CudaKernel:
    """Describe the attention of 128 features a head by warpgroups and bulk copies: q, k and v are tensor maps.

    The maps are of four dimensions, [feature, head, token, batch], with boxes of [64, 1, 128, 1], swizzled by 128
    bytes.
    """
    plain = attention(dtype, head=128, causal=causal)
    kind = _type(dtype)
    tensors = tuple((_TENSOR_MAP, name) for name in "qkv")
    return CudaKernel(
        entry=plain.entry.replace("nas_", "nas_hopper_"),
        header="hopper_attention.cuh",
        call=f"hopper_attention<nas::{kind}, {str(causal).lower()}>",
        arguments=(*tensors, *plain.arguments[3:-4], plain.arguments[-1]),
        threads=384,
        shared_bytes=5 * 128 * 128 * 2 + 9 * 8,
        preamble=wgmma(kind, 128, transposed=False) + wgmma(kind, 128, transposed=True),
        architecture="sm_90a",
    )


def attention_grid(batch: int, heads: int, queries: int) -> tuple[int, int, int]:
    """Return the blocks of an attention."""
    return (math.ceil(queries / _QUERIES), batch * heads, 1)


def gla_states(dtype: str = "bfloat16", *, key: int, value: int) -> CudaKernel:
    """Describe the first pass of chunkwise gated linear attention: the state before each chunk of 64 tokens."""
    _check_heads(key, value)
    tensors = (("const uint16_t*", "k"), ("const uint16_t*", "v"), ("const float*", "g"), ("uint16_t*", "states"))
    strides = ((_STRIDES, "k_strides"), (_STRIDES, "v_strides"), (_GATE_STRIDES, "g_strides"))
    return CudaKernel(
        entry=f"nas_gla_states_{dtype}_{key}_{value}",
        header="gla.cuh",
        call=f"gla_states<nas::{_type(dtype)}, {key}, {value}>",
        arguments=(*tensors, ("int", "tokens"), ("int", "heads"), *strides),
        threads=128,
        shared_bytes=2 * _CHUNK * 72 * 2 + _CHUNK * 68 * 4,
    )


def gla_states_grid(batch: int, heads: int, key: int, value: int) -> tuple[int, int, int]:
    """Return the blocks of the first pass."""
    return (key // 64 * (value // 64), batch * heads, 1)


def gla_outputs(dtype: str = "bfloat16", *, key: int, value: int) -> CudaKernel:
    """Describe the second pass of chunkwise gated linear attention: the outputs of all chunks."""
    _check_heads(key, value)
    tensors = (*(("const uint16_t*", name) for name in "qkv"), ("const float*", "g"), ("const uint16_t*", "states"))
    strides = ((_STRIDES, "q_strides"), (_STRIDES, "k_strides"), (_STRIDES, "v_strides"), (_GATE_STRIDES, "g_strides"))
    scalars = (("int", "tokens"), ("int", "heads"), ("float", "scale"))
    return CudaKernel(
        entry=f"nas_gla_outputs_{dtype}_{key}_{value}",
        header="gla.cuh",
        call=f"gla_outputs<nas::{_type(dtype)}, {key}, {value}>",
        arguments=(*tensors, ("uint16_t*", "o"), *scalars, *strides, (_STRIDES, "o_strides")),
        threads=128,
        shared_bytes=(2 * _CHUNK * (key + 8) + (_CHUNK + key) * (value + 8)) * 2 + _CHUNK * (key + 4) * 4,
    )


def gla_outputs_grid(batch: int, heads: int, tokens: int) -> tuple[int, int, int]:
    """Return the blocks of the second pass."""
    return (math.ceil(tokens / _CHUNK), batch * heads, 1)


def _type(dtype: str) -> str:
    if dtype not in TYPES:
        raise InputError("tensor cores take no such type here", expected=" or ".join(TYPES), found=dtype)
    return TYPES[dtype]


def _check_heads(*sizes: int) -> None:
    for size in sizes:
        if size not in HEAD_SIZES:
            expected = " or ".join(map(str, HEAD_SIZES))
            raise InputError("there is no kernel for heads of this size", expected=expected, found=str(size))
