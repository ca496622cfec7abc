"""NVIDIA GPUs through CUDA, started from this machine's kind of processor; no GPU is needed to compile for one.

A variant is an architecture as the CUDA compiler names it: `cuda:sm_80` (A100), `cuda:sm_86`, `cuda:sm_89`,
`cuda:sm_90` (H100, H200; the usual one), `cuda:sm_100` (B200), `cuda:sm_120`. One that ends in `a`, such as `sm_90a`,
may use what no other generation has. Code for an architecture runs on later ones of the same first digit.
"""

from __future__ import annotations

from typing import Final

from codegen.targets._gpu import resolve_gpu
from codegen.targets.base import Gpu, Target

USUAL: Final = "sm_90"
ARCHITECTURES: Final = (USUAL, "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_100a", "sm_120", "sm_120a")
"""Architectures that CUDA 13 compiles for and that have tensor cores for bfloat16; the first is the usual one."""

_HOST: Final = ""  # this machine's own
# Threads and static shared memory of a block: CUDA programming guide, compute capabilities 8.0 and later.
_THREADS, _SHARED_BYTES, _WARP = 1024, 48 * 1024, 32


def resolve(variant: str | None, threads: int | None) -> Target:
    """Describe a device; see the top.

    Args:
        variant: An architecture of `ARCHITECTURES`.
        threads: None.
    """
    devices = {name: (Gpu("cuda", name, _THREADS, _SHARED_BYTES, _WARP), _HOST) for name in ARCHITECTURES}
    return resolve_gpu("cuda", devices, variant, threads)
