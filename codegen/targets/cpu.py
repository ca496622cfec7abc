"""The processor of this machine, through LLVM.

Without a variant the code may use everything the host has. The variants `cpu:avx512`, `cpu:avx2` and `cpu:sse` compile
for the x86-64 micro-architecture level of that name (v4, v3, v2), so the artifact runs on any processor of the level.
"""

from __future__ import annotations

import dataclasses
import functools

from codegen import _tvm, machine
from codegen.kernels.base import AVX2, AVX512, NEON, SSE, Isa
from codegen.targets.base import Target
from ir.errors import InputError, TargetUnavailable, did_you_mean

# Flags of each x86-64 level beyond the one before it. Source: System V ABI, AMD64 supplement, section 3.1.1.
_LEVEL_2 = ("popcnt", "sse4_1", "sse4_2", "ssse3")
_LEVEL_3 = (*_LEVEL_2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_LEVEL_4 = (*_LEVEL_3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_NEON = ("asimd",)

# Further extensions that LLVM uses on its own account when the processor has them.
_EXTENSIONS = (
    *("avx512_bf16", "avx512_bitalg", "avx512_fp16", "avx512_vbmi2", "avx512_vnni", "avx512_vpopcntdq"),
    *("avx512ifma", "avx512vbmi", "avx_vnni", "gfni", "vaes", "vpclmulqdq"),
    *("asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2"),
)

# Widest first: the host gets the first whose flags it has.
LEVELS: tuple[tuple[Isa, tuple[str, ...], str | None], ...] = (
    (AVX512, _LEVEL_4, "x86-64-v4"),
    (AVX2, _LEVEL_3, "x86-64-v3"),
    (SSE, _LEVEL_2, "x86-64-v2"),
    (NEON, _NEON, None),
)


def resolve(variant: str | None, threads: int | None) -> Target:
    """Describe this machine, or a lower instruction-set level of it.

    Args:
        variant: `avx512`, `avx2`, `sse` or `neon`; the host's own when None.
        threads: Threads to compile for; all CPUs of the process when None.
    """
    count = len(machine.available_cpus()) if threads is None else machine.check_threads(threads)
    host = machine.cpu_features()
    isa, required, level_mcpu = _level(variant, host)
    portable = variant is not None and level_mcpu is not None
    features = required if portable else (*required, *(flag for flag in _EXTENSIONS if flag in host))
    mcpu = level_mcpu if portable and level_mcpu else _host_mcpu()
    return Target(
        name="cpu",
        kind="llvm",
        mcpu=mcpu,
        isa=dataclasses.replace(isa, threads=count, bf16_dot=isa is AVX512 and "avx512_bf16" in features),
        features=tuple(sorted(features)),
        threads=count,
    )


def _level(variant: str | None, host: frozenset[str]) -> tuple[Isa, tuple[str, ...], str | None]:
    supported = [level for level in LEVELS if host.issuperset(level[1])]
    names = [isa.name for isa, _, _ in supported]
    if variant is None and supported:
        return supported[0]
    if variant in names:
        return supported[names.index(variant)]
    known = [isa.name for isa, _, _ in LEVELS]
    if variant is not None and variant not in known:
        raise InputError(
            "unknown instruction set",
            where=f"cpu:{variant}",
            expected=f"one of {', '.join(known)}",
            found=repr(variant),
            hint=did_you_mean(variant, known),
        )
    raise TargetUnavailable(
        "this processor lacks the instruction set",
        where=f"cpu:{variant}" if variant else "cpu",
        expected=f"one of {', '.join(known)}",
        found=", ".join(names) or "none of them",
        hint=f"use cpu:{names[0]}" if names else None,
    )


@functools.cache
def _host_mcpu() -> str:
    """Return LLVM's name of the host processor, e.g. `znver4`."""
    return str(_tvm.Target.from_device("cpu").attrs["mcpu"])  # pyright: ignore[reportArgumentType]  # a map
