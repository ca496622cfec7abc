"""64-bit Arm processors with NEON, through LLVM: servers and boards with Linux, and Android phones.

`arm64` compiles for every such processor (Armv8-A). Words behind the colon, joined by `+`, say more: `android` is the
system, `dotprod`, `fp16`, `i8mm` and `bf16` are extensions that LLVM may use besides: `arm64:android+dotprod+fp16`.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from codegen.kernels.base import NEON
from codegen.targets.base import Target
from ir.errors import InputError, did_you_mean

USUAL_THREADS: Final = 4
"""Threads where none are named: the large cores of most phones and boards."""

_MOST_THREADS: Final = 256
_SYSTEMS: Final = {"linux": "aarch64-linux-gnu", "android": "aarch64-linux-android"}
# Extensions: LLVM's name, and what /proc/cpuinfo calls it.
_EXTENSIONS: Final = {
    "dotprod": ("dotprod", "asimddp"),
    "fp16": ("fullfp16", "asimdhp"),
    "i8mm": ("i8mm", "i8mm"),
    "bf16": ("bf16", "bf16"),
}


def resolve(variant: str | None, threads: int | None) -> Target:
    """Describe a processor by the words of its variant.

    Args:
        variant: Words joined by `+`: a system and extensions.
        threads: Threads to compile for; `USUAL_THREADS` when None.
    """
    count = USUAL_THREADS if threads is None else threads
    if not 1 <= count <= _MOST_THREADS:
        expected = f"1 to {_MOST_THREADS}"
        raise InputError("no such number of threads", where="threads", expected=expected, found=str(count))
    words = [word for word in (variant or "").split("+") if word]
    for word in words:
        _check(word)
    systems = [word for word in words if word in _SYSTEMS]
    if len(systems) > 1:
        raise InputError("a target has one system", where=f"arm64:{variant}", expected="one", found=", ".join(systems))
    extensions = [_EXTENSIONS[word] for word in sorted({word for word in words if word in _EXTENSIONS})]
    return Target(
        name="arm64",
        kind="llvm",
        mcpu="generic",
        isa=dataclasses.replace(NEON, threads=count),
        features=tuple(sorted({"asimd", *(flag for _, flag in extensions)})),
        threads=count,
        triple=_SYSTEMS[systems[0] if systems else "linux"],
        attributes=("+neon", *(f"+{name}" for name, _ in extensions)),
    )


def _check(word: str) -> None:
    known = [*_SYSTEMS, *_EXTENSIONS]
    if word not in known:
        raise InputError(
            "no such system or extension",
            where=f"arm64:{word}",
            expected=f"words such as {', '.join(known)}, joined by +",
            found=repr(word),
            hint=did_you_mean(word, known),
        )
