"""The target that a device is: compiled for on this machine, run on that one."""

from __future__ import annotations

import dataclasses
import platform
from typing import Final

from codegen import machine, targets
from codegen.devices.report import Report
from codegen.kernels.base import Isa
from codegen.targets import arm64, cpu
from codegen.targets.base import Target
from ir.errors import InputError, TargetUnavailable

_X86: Final = "x86_64"
_ARM: Final = "aarch64"
# Extensions of x86-64 that LLVM may use beyond a level; its names, by those of /proc/cpuinfo.
_ATTRIBUTES: Final = {"avx512_bf16": "+avx512bf16", "avx512_vnni": "+avx512vnni", "avx512_fp16": "+avx512fp16"}
# Words of the target `arm64` by flags of /proc/cpuinfo.
_WORDS: Final = {"asimddp": "dotprod", "asimdhp": "fp16", "bf16": "bf16", "i8mm": "i8mm"}


def target_of(report: Report, spec: str = "cpu", threads: int | None = None) -> Target:
    """Return what to compile for, for a device.

    Args:
        report: What the device says of itself.
        spec: `cpu` is the device's own processor with all that it has, `cpu:avx2` a level of it; others are targets as
            everywhere, which the device must be able to run.
        threads: Threads to compile for; all of the device's where None.

    Raises:
        InputError: There is no such target, or the device has not so many CPUs.
        TargetUnavailable: The device cannot run it, or nothing here compiles for it.
    """
    if threads is not None and not 1 <= threads <= report.threads:
        raise InputError(
            "the number of threads does not fit the device",
            where="threads",
            expected=f"1 to {report.threads}, the CPUs of {report.name}",
            found=str(threads),
        )
    count = threads or report.threads
    name, _, variant = spec.partition(":")
    if name != "cpu":
        target = targets.get(spec, threads=count)
    elif report.architecture == _ARM:
        words = [word for flag, word in _WORDS.items() if flag in report.features]
        target = arm64.resolve("+".join(words) if not variant else variant.removeprefix("neon"), count)
    elif report.architecture == _X86:
        target = _x86(report, variant or None, count)
    else:
        raise _unavailable(report, spec, "x86_64 or aarch64", report.architecture)
    return check_target(report, target, spec)


def check_target(report: Report, target: Target, spec: str | None = None) -> Target:
    """Return a target that a device runs.

    Args:
        report: What the device says of itself.
        target: The target.
        spec: What the user called it.

    Raises:
        TargetUnavailable: The device does not run it.
    """
    spec = spec or target.name
    if target.architecture != report.architecture:
        raise _unavailable(report, spec, f"a target of {report.architecture}", target.architecture)
    missing = sorted(set(target.features) - report.features)
    if missing:
        raise _unavailable(report, spec, f"a processor with {', '.join(missing)}", report.cpu)
    return target


def _x86(report: Report, variant: str | None, threads: int) -> Target:
    """Return a level of x86-64 that the device has; the widest, with its extensions, where no variant is named."""
    here = machine.describe()
    if (report.cpu, report.features) == (here["cpu"], frozenset(here["features"])):
        # The same processor: LLVM knows its name, so the code is the same as for measuring here.
        target = cpu.resolve(variant, None)
        return dataclasses.replace(target, threads=threads, isa=dataclasses.replace(target.isa, threads=threads))
    levels = [level for level in cpu.LEVELS if report.features.issuperset(level[1]) and level[2] is not None]
    wanted = [level for level in levels if variant in (None, level[0].name)]
    if not wanted:
        known = ", ".join(isa.name for isa, _, _ in levels) or "none that is known here"
        raise _unavailable(report, f"cpu:{variant}" if variant else "cpu", f"one of {known}", report.cpu)
    isa, features, mcpu = wanted[0]
    extensions = [flag for flag in _ATTRIBUTES if variant is None and isa.lanes == 16 and flag in report.features]
    target = Target(
        name="cpu",
        kind="llvm",
        mcpu=str(mcpu),
        isa=_with_threads(isa, threads, bf16_dot="avx512_bf16" in extensions),
        features=tuple(sorted({*features, *extensions})),
        threads=threads,
        attributes=tuple(_ATTRIBUTES[flag] for flag in extensions),
    )
    runs_here = platform.machine() == _X86 and machine.cpu_features().issuperset(target.features)
    return target if runs_here else dataclasses.replace(target, triple="x86_64-linux-gnu")


def _with_threads(isa: Isa, threads: int, *, bf16_dot: bool) -> Isa:
    return dataclasses.replace(isa, threads=threads, bf16_dot=bf16_dot)


def _unavailable(report: Report, spec: str, expected: str, found: str) -> TargetUnavailable:
    return TargetUnavailable(
        f"the device {report.name} does not run the target '{spec}'", where="target", expected=expected, found=found
    )
