"""Targets: a file each, found by folder listing, the stem is the key.

A target file offers `resolve(variant: str | None, threads: int | None) -> Target`. It is imported when it is asked for,
so that listing the targets loads no compiler.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from codegen.targets.base import Target
from ir.errors import InputError, did_you_mean

__all__ = ["Target", "available", "get"]


def available() -> list[str]:
    """List the targets that this installation can compile for."""
    stems = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(stem for stem in stems if stem != "base" and not stem.startswith("_"))


def get(spec: str, *, threads: int | None = None, isa: str | None = None) -> Target:
    """Resolve a target by name.

    Args:
        spec: A key, optionally with a variant behind a colon: `cpu`, `cpu:avx2`.
        threads: Threads to compile for; all of the machine's when omitted.
        isa: The variant, as an alternative to writing it behind a colon.

    Raises:
        InputError: No such target, variant or number of threads.
        TargetUnavailable: The target exists but not on this machine.
    """
    name, _, suffix = spec.partition(":")
    names = available()
    if name in names:
        return importlib.import_module(f"codegen.targets.{name}").resolve(_variant(spec, suffix, isa), threads)
    raise InputError(
        "unknown target",
        where="target",
        expected=f"one of {', '.join(names)}",
        found=repr(spec),
        hint=did_you_mean(name, names),
    )


def _variant(spec: str, suffix: str, isa: str | None) -> str | None:
    if suffix and isa and suffix != isa:
        raise InputError("the target names one instruction set and the option another", where=spec, found=isa)
    return suffix or isa
