"""What this machine is: CPU, instruction sets, cores, memory, clocks, software versions, and where caches live.

Standard library only: the runtime that loads artifacts imports this module in environments without anything else.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from ir.errors import InputError

_DISTRIBUTIONS = {
    "nas": "nas",
    "tvm": "apache-tvm",
    "tvm_ffi": "apache-tvm-ffi",
    "numpy": "numpy",
    "torch": "torch",
}


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries that decide what code is generated and how it runs.

    Nothing is imported; a library that is not installed has the version None.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def cpu_features() -> frozenset[str]:
    """Return the instruction-set flags that the kernel reports for this CPU, by their /proc/cpuinfo names."""
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def available_cpus() -> list[int]:
    """List the CPUs that this process may use, one of each physical core first, then their sibling threads."""
    allowed = sorted(os.sched_getaffinity(0))
    seen: set[str] = set()
    first: list[int] = []
    siblings: list[int] = []
    for cpu in allowed:
        core = _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        (siblings if core in seen else first).append(cpu)
        seen.add(core)
    return first + siblings


def check_threads(threads: int) -> int:
    """Return `threads` when this process has that many CPUs.

    Raises:
        InputError: The number is below 1 or above the number of CPUs.
    """
    available = len(available_cpus())
    if not 1 <= threads <= available:
        raise InputError(
            "the number of threads does not fit this machine",
            where="threads",
            expected=f"1 to {available}, the CPUs that this process may use",
            found=str(threads),
        )
    return threads


def describe() -> dict[str, Any]:
    """Describe the machine for the record of a measurement.

    Returns:
        JSON-ready facts: CPU model, cores, flags, memory in bytes, clocks in MHz, operating system, versions.
    """
    info = _cpuinfo()
    cpus = available_cpus()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "logical_cpus": len(cpus),
        "physical_cores": _physical_cores(cpus),
        "features": sorted(cpu_features()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "clock_mhz": float(info["cpu MHz"]) if "cpu MHz" in info else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "os": f"{platform.system()} {platform.release()}",
        "versions": versions(),
    }


def cache_directory() -> Path:
    """Return the folder of locks and tuning databases: `NAS_CACHE_DIR`, else `~/.cache/nas`."""
    chosen = os.environ.get("NAS_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "nas"


def _physical_cores(cpus: list[int]) -> int:
    siblings = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return len(siblings)


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo."""
    text = (_read("/proc/cpuinfo") or "").split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
