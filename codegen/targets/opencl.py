"""Graphics processors through OpenCL C 1.2 and later: those of phones and boards, and any other.

`opencl` keeps to what every device of today has; `opencl:adreno` and `opencl:mali` know more of theirs and are started
from 64-bit Arm with Android.
"""

from __future__ import annotations

from typing import Final

from codegen.targets._gpu import resolve_gpu
from codegen.targets.base import Gpu, Target

_ANDROID: Final = "aarch64-linux-android"
# Work-group sizes and local memory: OpenCL 3.0 specification, table 5 (least values), and the makers' guides.
_VARIANTS: Final = {
    "generic": (Gpu("opencl", "generic", max_threads=256, shared_bytes=32 * 1024, warp=32), ""),
    "adreno": (Gpu("opencl", "adreno", max_threads=512, shared_bytes=32 * 1024, warp=64), _ANDROID),
    "mali": (Gpu("opencl", "mali", max_threads=256, shared_bytes=32 * 1024, warp=16), _ANDROID),
}


def resolve(variant: str | None, threads: int | None) -> Target:
    """Describe a device; see the top.

    Args:
        variant: `generic`, `adreno` or `mali`.
        threads: None.
    """
    return resolve_gpu("opencl", _VARIANTS, variant, threads)
