"""What targets with a graphics processor have in common."""

from __future__ import annotations

from collections.abc import Mapping

from codegen.kernels.base import Isa
from codegen.targets.base import Gpu, Target
from ir.errors import InputError, did_you_mean


def resolve_gpu(name: str, variants: Mapping[str, tuple[Gpu, str]], variant: str | None, threads: int | None) -> Target:
    """Describe a graphics processor and the processor beside it that starts its kernels.

    Args:
        name: Registry key.
        variants: Device, and triple of the processor beside it, by variant; the first is the usual one.
        variant: Which of them.
        threads: Must be None: kernels are started from one thread.

    Raises:
        InputError: No such variant, or a number of threads.
    """
    chosen = variant or next(iter(variants))
    if chosen not in variants:
        raise InputError(
            "no such device",
            where=f"{name}:{chosen}",
            expected=f"one of {', '.join(variants)}",
            found=repr(chosen),
            hint=did_you_mean(chosen, list(variants)),
        )
    if threads not in (None, 1):
        raise InputError(
            "a graphics processor has no number of threads to choose",
            where="threads",
            expected="none",
            found=str(threads),
        )
    gpu, triple = variants[chosen]
    return Target(
        name=name,
        kind="llvm",
        mcpu="generic",
        isa=Isa(gpu.model, lanes=1, registers=0, threads=1, strassen=False),
        features=(),
        threads=1,
        triple=triple,
        gpu=gpu,
    )
