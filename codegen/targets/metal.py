"""Graphics processors of Apple through Metal: `metal:ios` (the usual one) and `metal:macos`, both on 64-bit Arm."""

from __future__ import annotations

from typing import Final

from codegen.targets._gpu import resolve_gpu
from codegen.targets.base import Gpu, Target

# Threads and memory of a threadgroup: Metal feature set tables, Apple family 4 and later.
_VARIANTS: Final = {
    "ios": (Gpu("metal", "ios", max_threads=512, shared_bytes=32 * 1024, warp=32), "arm64-apple-ios"),
    "macos": (Gpu("metal", "macos", max_threads=1024, shared_bytes=32 * 1024, warp=32), "arm64-apple-macos"),
}


def resolve(variant: str | None, threads: int | None) -> Target:
    """Describe a device; see the top.

    Args:
        variant: `ios` or `macos`.
        threads: None.
    """
    return resolve_gpu("metal", _VARIANTS, variant, threads)
