"""Dense products of models on tensor cores: those whose operands are bfloat16 and whose sizes fit.

What the graph rounds to bfloat16 loses nothing there; sums are float32. Everything else goes the way of all devices.
"""

from __future__ import annotations

from typing import Final

from codegen._tvm import PrimFunc
from codegen.gpu.cuda.kernels import ACTIVATIONS, CudaKernel, gemm, gemm_tile
from codegen.gpu.cuda.sites import Launch, write_launches
from codegen.kernels.base import Array, Knobs
from codegen.kernels.gemm import GemmKernel
from codegen.targets.base import Gpu
from ir.rounding import bfloat16_bits

LEAST_ROWS: Final = 16
"""Rows of the smallest product that tensor cores make."""
_STEP: Final = 8  # elements of 16 bytes


def fits(kernel: GemmKernel) -> bool:
    """Tell whether a product has the form that the kernel takes."""
    plain = kernel.gate is None and kernel.scale == 1.0 and kernel.a_view is None
    typed = kernel.a_dtype == kernel.precision == "bfloat16"
    stored = kernel.out_dtype == "float32" or not kernel.residual
    sized = kernel.m >= LEAST_ROWS and kernel.n % _STEP == 0 and kernel.k % _STEP == 0
    return plain and typed and stored and sized and (kernel.activation or "identity") in ACTIVATIONS


def write_gemm(kernel: GemmKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write the function that starts the kernel."""
    del gpu, knobs
    site, grid = gemm_site(kernel), gemm_tile(kernel.m, kernel.n).grid(kernel.m, kernel.n)
    names = [name for _, name in site.arguments]
    return write_launches(kernel, names, [Launch(site, grid[:2])], packed=[None, ((kernel.n, kernel.k), "uint16")])


def pack_gemm(kernel: GemmKernel, gpu: Gpu, knobs: Knobs, index: int, array: Array) -> Array | None:
    """Bring the weight to `[N, K]` in bfloat16."""
    del kernel, gpu, knobs
    return bfloat16_bits(array.T.copy()) if index == 1 else None


def gemm_site(kernel: GemmKernel) -> CudaKernel:
    """Return the entry for one product: pointers to its operands, everything else fixed."""
    tile = gemm_tile(kernel.m, kernel.n)
    plain = gemm("bfloat16", activation=kernel.activation or "identity", out=kernel.out_dtype, tile=tile)
    given = {"a", "w", "c", *(["bias"] if kernel.bias else []), *(["residual"] if kernel.residual else [])}
    arguments = tuple(argument for argument in plain.arguments if argument[1] in given)
    names = [name if name in given else "nullptr" for _, name in plain.arguments[:5]]
    words = [word for word, there in (("bias", kernel.bias), ("residual", kernel.residual)) if there]
    return CudaKernel(
        entry="_".join([plain.entry, *words, f"{kernel.m}x{kernel.n}x{kernel.k}"]),
        header=plain.header,
        call=plain.call,
        arguments=arguments,
        threads=plain.threads,
        shared_bytes=plain.shared_bytes,
        operands=(*names, str(kernel.m), str(kernel.n), str(kernel.k)),
    )
