"""Which kernels of models are written in CUDA C++; all others are written as for every kind of device."""

from __future__ import annotations

from codegen.gpu.cuda import attention, products, recurrences
from codegen.gpu.registry import Generator
from codegen.kernels.attention import AttentionKernel
from codegen.kernels.base import Kernel
from codegen.kernels.gemm import GemmKernel
from codegen.kernels.recurrence import OuterScanKernel
from codegen.targets.base import Gpu

TENSOR_CORES = "tensor cores"
"""The `path` among the knobs of what runs on them."""


def find(kernel: Kernel, gpu: Gpu) -> Generator | None:
    """Return what writes a kernel in CUDA C++, None where nothing here does."""
    if isinstance(kernel, GemmKernel) and products.fits(kernel):
        packs = products.pack_gemm, lambda _, index: index == 1
        return Generator(products.write_gemm, lambda *_: {"path": TENSOR_CORES}, *packs)
    if isinstance(kernel, AttentionKernel) and attention.fits_tensor_cores(kernel, gpu):
        return Generator(attention.write_many, lambda *_: {"path": TENSOR_CORES})
    if isinstance(kernel, AttentionKernel) and attention.fits_few_queries(kernel):
        return Generator(attention.write_few, lambda made, _: {"path": "shares", "shares": attention.key_shares(made)})
    if isinstance(kernel, OuterScanKernel) and recurrences.fits(kernel, gpu):
        return Generator(recurrences.write_scan, lambda *_: {"path": TENSOR_CORES})
    return None
