"""Which generator writes which family of kernels for a graphics processor.

Every family has a generator here that serves all kinds of devices. A kind may have better ones for some kernels: a
module of `SPECIAL` offers `find(kernel, gpu) -> Generator | None`, which is asked first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from codegen._tvm import PrimFunc
from codegen.gpu.attention import attention_knobs, write_attention
from codegen.gpu.elementwise import fused_knobs, write_fused, write_rope
from codegen.gpu.products import (
    batch_gemm_knobs,
    conv_knobs,
    gemm_knobs,
    write_batch_gemm,
    write_conv,
    write_gemm,
)
from codegen.gpu.recurrences import (
    outer_scan_knobs,
    selective_knobs,
    write_delta_scan,
    write_outer_scan,
    write_scan,
    write_selective_scan,
)
from codegen.gpu.routing import write_scatter, write_top_k
from codegen.gpu.rows import norm_knobs, write_norm, write_softmax
from codegen.gpu.transforms import write_fft, write_long_conv
from codegen.gpu.windows import write_window
from codegen.kernels.attention import AttentionKernel
from codegen.kernels.base import Array, Kernel, Knobs
from codegen.kernels.batch_gemm import BatchGemmKernel
from codegen.kernels.conv import ConvKernel
from codegen.kernels.delta_scan import DeltaScanKernel
from codegen.kernels.fft import FftKernel
from codegen.kernels.fused import FusedKernel
from codegen.kernels.gemm import GemmKernel
from codegen.kernels.long_conv import LongConvKernel
from codegen.kernels.norm import NormKernel
from codegen.kernels.recurrence import OuterScanKernel
from codegen.kernels.rope import RopeKernel
from codegen.kernels.scan import ScanKernel
from codegen.kernels.scatter import ScatterAddKernel
from codegen.kernels.selective_scan import SelectiveScanKernel
from codegen.kernels.softmax import SoftmaxKernel
from codegen.kernels.topk import TopKKernel
from codegen.kernels.window import WindowKernel
from codegen.targets.base import Gpu
from ir.errors import CompileError


def _nothing(kernel: Any, gpu: Gpu) -> Knobs:
    del kernel, gpu
    return {}


@dataclass(frozen=True)
class Generator:
    """How a family is written for a device.

    Attributes:
        build: `build(kernel, gpu, knobs)` writes one TIR function in destination-passing style, bound to threads.
        knobs: The rule that picks knobs without measuring.
        pack: `pack(kernel, gpu, knobs, index, array)` brings a constant input into another layout, or returns None.
        packs: `packs(kernel, index)`: whether `pack` may return something for this input.
    """

    build: Callable[[Any, Gpu, Knobs], PrimFunc]
    knobs: Callable[[Any, Gpu], Knobs] = _nothing
    pack: Callable[[Any, Gpu, Knobs, int, Array], Array | None] | None = None
    packs: Callable[[Any, int], bool] | None = None


GENERATORS: Final[Mapping[type[Kernel], Generator]] = {
    AttentionKernel: Generator(write_attention, attention_knobs),
    BatchGemmKernel: Generator(write_batch_gemm, batch_gemm_knobs),
    ConvKernel: Generator(write_conv, conv_knobs),
    DeltaScanKernel: Generator(write_delta_scan, outer_scan_knobs),
    FftKernel: Generator(write_fft),
    FusedKernel: Generator(write_fused, fused_knobs),
    GemmKernel: Generator(write_gemm, gemm_knobs),
    LongConvKernel: Generator(write_long_conv),
    NormKernel: Generator(write_norm, norm_knobs),
    OuterScanKernel: Generator(write_outer_scan, outer_scan_knobs),
    RopeKernel: Generator(write_rope),
    ScanKernel: Generator(write_scan),
    ScatterAddKernel: Generator(write_scatter),
    SelectiveScanKernel: Generator(write_selective_scan, selective_knobs),
    SoftmaxKernel: Generator(write_softmax),
    TopKKernel: Generator(write_top_k),
    WindowKernel: Generator(write_window),
}
"""The generator of each family for every kind of device."""

SPECIAL: Final[Mapping[str, str]] = {"cuda": "codegen.gpu.cuda.generators"}
"""For a kind of device, the module that has better generators for some kernels."""


def generator(kernel: Kernel, gpu: Gpu) -> Generator:
    """Return what writes a kernel for a device.

    Raises:
        CompileError: Nothing does.
    """
    if gpu.kind in SPECIAL:
        special: Generator | None = importlib.import_module(SPECIAL[gpu.kind]).find(kernel, gpu)
        if special is not None:
            return special
    if type(kernel) not in GENERATORS:
        raise CompileError("no generator for graphics processors", where=kernel.key, found=kernel.family)
    return GENERATORS[type(kernel)]
