"""Shapes that stand for each family of kernels, with the plain torch call of the same function where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from codegen.kernels.attention import AttentionKernel
from codegen.kernels.base import Array, Kernel
from codegen.kernels.batch_gemm import BatchGemmKernel
from codegen.kernels.conv import ConvKernel
from codegen.kernels.fused import FusedKernel
from codegen.kernels.gemm import GemmKernel
from codegen.kernels.norm import NormKernel
from codegen.kernels.recurrence import OuterScanKernel
from codegen.kernels.rope import RopeKernel
from codegen.kernels.scan import ScanKernel
from codegen.kernels.selective_scan import SelectiveScanKernel
from codegen.kernels.softmax import SoftmaxKernel
from codegen.kernels.window import WindowKernel
from ir.builder import Builder
from ir.ops.convolution import Conv, Pool
from ir.types import TensorType

Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
Eager = Callable[..., Any]
"""`eager(torch, *tensors)`: the same function of the same logical operands."""


@dataclass(frozen=True)
class KernelCase:
    """One shape of a family.

    Attributes:
        name: What reports call it.
        kernel: The kernel.
        eager: The function in plain torch, None where torch has none.
        draws: How operands are drawn, by position; standard normal where not given.
    """

    name: str
    kernel: Kernel
    eager: Eager | None = None
    draws: tuple[tuple[int, Draw], ...] = ()

    @property
    def family(self) -> str:
        """Family of the kernel."""
        return self.kernel.family

    def operands(self) -> list[Array]:
        """Draw the operands; the same ones each time."""
        rng, drawn = np.random.default_rng(0), dict(self.draws)
        arrays: list[Array] = []
        for index, operand in enumerate(self.kernel.inputs):
            if np.dtype(operand.dtype).kind == "f":
                draw = drawn.get(index, _normal)
                arrays.append(draw(rng, operand.shape).astype(operand.dtype))
            else:
                arrays.append(np.zeros(operand.shape, operand.dtype))
        return arrays


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape)


def _log_decay(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return -0.1 * np.abs(rng.standard_normal(shape))


def _decay(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.uniform(0.8, 1.0, shape)


def _step(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.uniform(0.01, 0.1, shape)


def _gemm(m: int, n: int, k: int) -> KernelCase:
    return KernelCase(f"{m}x{n}x{k}", GemmKernel(m, n, k), lambda torch, a, w: torch.mm(a, w))


def _gemm_bfloat16(m: int, n: int, k: int) -> KernelCase:
    """Operands rounded to bfloat16, a float32 result: torch has no such product."""
    return KernelCase(f"{m}x{n}x{k}, bfloat16", GemmKernel(m, n, k, precision="bfloat16"))


def _attention(heads: int, tokens: int, *, queries: int | None = None, causal: bool = False) -> KernelCase:
    size = 64
    q_len = queries or tokens
    kernel = AttentionKernel(1, q_len, tokens, heads, heads, size, size, size**-0.5, causal=causal)

    def eager(torch: Any, *qkv: Any) -> Any:
        q, k, v = (item.view(1, -1, heads, size).transpose(1, 2) for item in qkv)
        # torch aligns its triangle with the first key, ours with the last: one query sees them all
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal and q_len > 1)
        return mixed.transpose(1, 2).reshape(q_len, -1)

    text = f"{heads} heads, {q_len}x{tokens}{', causal' if causal else ''}"
    return KernelCase(text, kernel, eager)


def _outer_scan(decay: str, t: int) -> KernelCase:
    draws = ((3, _log_decay),) if decay != "none" else ()
    return KernelCase(f"4 heads 128x128, decay {decay}, T={t}", OuterScanKernel(1, t, 4, 128, 128, decay), draws=draws)


def _selective_scan(t: int) -> KernelCase:
    kernel = SelectiveScanKernel(1, t, channels=1024, state=16, decaying=True, scaled_input=True)
    draws: tuple[tuple[int, Draw], ...] = ((3, _step), (4, lambda rng, shape: -np.exp(rng.standard_normal(shape))))
    return KernelCase(f"1024 channels x 16, T={t}", kernel, draws=draws)


def _norm(kind: Any, rows: int, width: int, **options: Any) -> KernelCase:
    kernel = NormKernel(rows, width, kind, 0.0 if kind == "softmax" else 1e-5, **options)

    def eager(torch: Any, x: Any, *vectors: Any) -> Any:
        if kind == "softmax":
            return torch.softmax(x, -1)
        if kind == "rms_norm":
            return torch.nn.functional.rms_norm(x, (width,), *vectors, eps=1e-5)
        return torch.nn.functional.layer_norm(x, (width,), *vectors, eps=1e-5)

    return KernelCase(f"{kind} {rows}x{width}", kernel, eager)


def _depthwise(width: int) -> KernelCase:
    op = Conv((1, 1), ((3, 3), (3, 3)), (1, 1), width)
    kernel = WindowKernel(TensorType((1, 14, 14, width)), TensorType((7, 7, 1, width)), op)

    def eager(torch: Any, x: Any, w: Any) -> Any:
        y = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1), padding=3, groups=width)
        return y.permute(0, 2, 3, 1)

    return KernelCase(f"depthwise 7x7, 14x14x{width}", kernel, eager)


def _causal_conv(tokens: int, width: int) -> KernelCase:
    op = Conv((1,), ((3, 0),), (1,), width)
    kernel = WindowKernel(TensorType((1, tokens, width)), TensorType((4, 1, width)), op)

    def eager(torch: Any, x: Any, w: Any) -> Any:
        y = torch.nn.functional.conv1d(x.transpose(1, 2), w.permute(2, 1, 0), padding=3, groups=width)
        return y[..., :tokens].transpose(1, 2)

    return KernelCase(f"causal depthwise 4, {tokens}x{width}", kernel, eager)


def _conv(size: int, channels: int, outputs: int, stride: int = 1, groups: int = 1, window: int = 3) -> KernelCase:
    half = window // 2
    op = Conv((stride, stride), ((half, half), (half, half)), (1, 1), groups)
    weight = TensorType((window, window, channels // groups, outputs))
    kernel = ConvKernel(TensorType((1, size, size, channels)), weight, op)

    def eager(torch: Any, x: Any, w: Any) -> Any:
        options = {"padding": half, "stride": stride, "groups": groups}
        return torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), w.permute(3, 2, 0, 1), **options).permute(0, 2, 3, 1)

    text = f"{window}x{window}, {size}x{size}x{channels} to {outputs}, stride {stride}"
    return KernelCase(text + (f", {groups} groups" if groups > 1 else ""), kernel, eager)


def _average(width: int) -> KernelCase:
    op = Pool("average", (3, 3), (1, 1), ((1, 1), (1, 1)))

    def eager(torch: Any, x: Any) -> Any:
        y = torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False)
        return y.permute(0, 2, 3, 1)

    return KernelCase(f"average 3x3, 14x14x{width}", WindowKernel(TensorType((1, 14, 14, width)), None, op), eager)


def _gelu(rows: int, width: int) -> KernelCase:
    b = Builder()
    kernel = FusedKernel(b.build(y=b.gelu(b.input("x", (rows, width)))))
    return KernelCase(f"gelu {rows}x{width}", kernel, lambda torch, x: torch.nn.functional.gelu(x))


def _gate(rows: int, width: int) -> KernelCase:
    b = Builder()
    x, gate, skip = (b.input(name, (rows, width)) for name in ("x", "gate", "skip"))
    kernel = FusedKernel(b.build(y=x * b.silu(gate) + skip))
    return KernelCase(
        f"x silu(g) + s, {rows}x{width}", kernel, lambda torch, x, g, s: x * torch.nn.functional.silu(g) + s
    )


def _transpose(rows: int, width: int) -> KernelCase:
    b = Builder()
    kernel = FusedKernel(b.build(y=b.transpose(b.input("x", (1, rows, width)), 0, 2, 1)))
    return KernelCase(f"transpose {rows}x{width}", kernel, lambda torch, x: x.transpose(1, 2).contiguous())


def _rope(tokens: int) -> KernelCase:
    kernel = RopeKernel(1, tokens, 8, 64)
    table = kernel.table()

    def eager(torch: Any, x: Any, table: Any) -> Any:
        cos, sin = table[:, None, :32], table[:, None, 32:]
        low, high = x.view(tokens, 8, 64).split(32, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).view(tokens, -1)

    return KernelCase(f"8 heads of 64, T={tokens}", kernel, eager, ((1, lambda rng, shape: table),))


def _scan(steps: int, inner: int, decay: bool) -> KernelCase:
    kernel = ScanKernel(1, steps, inner, decay)
    eager: Eager | None = None if decay else lambda torch, x: torch.cumsum(x, 1)
    text = f"{'linear' if decay else 'cumsum'} {steps}x{inner}"
    return KernelCase(text, kernel, eager, ((0, _decay),) if decay else ())


def make_cases() -> tuple[KernelCase, ...]:
    """Make the cases, family by family."""
    return (
        *(_gemm(*shape) for shape in ((128, 3072, 768), (128, 768, 3072), (512, 2304, 768), (197, 576, 192))),
        *(_gemm(*shape) for shape in ((1, 1536, 512), (1, 512, 1365))),
        *(_gemm_bfloat16(*shape) for shape in ((128, 3072, 768), (512, 2304, 768))),
        KernelCase("12x 128x128x64", BatchGemmKernel(12, 128, 128, 64), lambda torch, a, b: torch.bmm(a, b)),
        KernelCase("12x 128x64x128", BatchGemmKernel(12, 128, 64, 128), lambda torch, a, b: torch.bmm(a, b)),
        *(_attention(12, tokens) for tokens in (128, 512)),
        _attention(8, 512, causal=True),
        _attention(8, 512, queries=1, causal=True),
        *(_outer_scan(decay, 512) for decay in ("none", "head", "key")),
        _selective_scan(512),
        _norm("layer_norm", 128, 768, scale=True, bias=True),
        _norm("rms_norm", 512, 512, scale=True),
        _norm("softmax", 1536, 128),
        KernelCase("axis 1 of 196x512", SoftmaxKernel(1, 196, 512), lambda torch, x: torch.softmax(x, 1)),
        _depthwise(384),
        _causal_conv(512, 1024),
        _average(320),
        _conv(14, 256, 256),
        _conv(56, 64, 128, stride=2),
        _conv(224, 3, 64, stride=2, window=7),
        _conv(28, 128, 128, groups=4),
        _gelu(128, 3072),
        _gate(512, 1365),
        _transpose(196, 512),
        _rope(512),
        _scan(512, 512, decay=True),
        _scan(512, 512, decay=False),
    )


FAMILIES: Final = (
    *("gemm", "batch_gemm", "attention", "outer_scan", "selective_scan"),
    *("norm", "softmax", "window", "conv", "fused", "rope", "scan"),
)
"""What `--families` may name; softmax is a kind of norm."""


def cases_of(families: tuple[str, ...] | list[str]) -> list[KernelCase]:
    """Return the cases of some families, all where none is named."""
    return [case for case in make_cases() if not families or _family_name(case) in families]


def _family_name(case: KernelCase) -> str:
    return "softmax" if getattr(case.kernel, "kind", None) == "softmax" else case.family
