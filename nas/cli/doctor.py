"""`nas doctor`: is everything here that the tool needs?"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import typer

from nas.cli.options import Json
from nas.cli.output import output

_PINNED = ("apache-tvm", "apache-tvm-ffi", "torch")
_LIBRARIES = ("numpy", "pydantic", "ray", "safetensors", "scikit-learn", "matplotlib", "rich", "typer")
_BENCH = ("onnx", "onnxscript", "onnxruntime", "openvino")
_ENOUGH_DISK_BYTES = 1 << 30
_ENOUGH_MEMORY_BYTES = 2 << 30
_COMPILE_LIMIT_S = 120.0

# Generates code, links it, and runs it, in a process of its own: what fails there must not take this one along.
_TRIAL_BUILD = """
import numpy as np
from codegen import targets
from codegen.compile import compile_graph
from ir.builder import Builder
b = Builder()
x = b.input("x", (4, 8))
graph = b.build(y=x + x)
artifact = compile_graph(graph, {}, targets.get("cpu", threads=1))
print(f"a small graph was compiled and agrees with torch within {artifact.verification_error:.1e}")
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: `ok`, `warn` for what the tool can do without, `fail` for what it needs.
        found: What is there.
        hint: What to do about it.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    hint: str = ""


def doctor(json: Json = False) -> None:
    """Check this machine and installation: Python, compiler, versions, CPU, folders. Exit code 1 if unusable."""
    with output(json) as out:
        checks = run_checks()
        usable = all(check.status != "fail" for check in checks)
        if out.json:
            out.data({"ok": usable, "checks": [asdict(check) for check in checks]})
        else:
            width = max(len(check.name) for check in checks)
            for check in checks:
                out.text(f"{check.status:4}  {check.name:{width}}  {check.found}")
                out.text(*([f"      {'':{width}}  {check.hint}"] if check.hint else []))
            out.text("", "Ready." if usable else "Not ready: see what says fail.")
    if not usable:
        raise typer.Exit(1)


def run_checks() -> list[Check]:
    """Look at everything, the cheap things first."""
    checks = [_python(), _compiler(), *(_pinned(name) for name in _PINNED), _libraries()]
    checks += [_cpu(), _memory(), _load(), _cache(), _temporary(), _disk(), _bench_extra()]
    broken = any(check.status == "fail" for check in checks)
    return checks if broken else [*checks, _builds()]


def _python() -> Check:
    return Check("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")


def _compiler() -> Check:
    """TVM links generated code with the system's C++ compiler."""
    chosen = os.environ.get("CXX")
    found = next((path for name in (chosen, "g++", "gcc", "clang++") if name and (path := shutil.which(name))), None)
    if found is not None:
        return Check("compiler", "ok", found)
    hint = "apt install g++" if shutil.which("apt-get") else "install gcc with the package manager of this system"
    return Check("compiler", "fail", "none of g++, gcc, clang++ is on the path", hint)


def _pinned(name: str) -> Check:
    """Compare a library whose version matters with what this package asks for."""
    wanted = _wanted().get(name)
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", f"pip install {name}" + (f"=={wanted}" if wanted else ""))
    if wanted is None or found.partition("+")[0] == wanted:
        return Check(name, "ok", found)
    return Check(name, "fail", f"{found}, but {wanted} is needed", f"pip install {name}=={wanted}")


def _wanted() -> dict[str, str]:
    """Return the exact versions that the installed package, or the source folder, asks for."""
    try:
        lines = metadata.requires("nas") or []
    except metadata.PackageNotFoundError:
        lines = []
    if not lines:
        project = Path(__file__).parents[2] / "pyproject.toml"
        lines = project.read_text(encoding="utf-8").splitlines() if project.is_file() else []
    pins = (re.match(r"[\s\"']*([\w-]+)==([\w.]+)", line) for line in lines)
    return {pin[1]: pin[2] for pin in pins if pin}


def _libraries() -> Check:
    missing: list[str] = []
    found: list[str] = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("libraries", "fail", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Check("libraries", "ok", ", ".join(found))


def _cpu() -> Check:
    from codegen import machine

    facts = machine.describe()
    flags = facts["features"]
    level = next((name for name in ("avx512f", "avx2", "sse4_2", "asimd") if name in flags), None)
    threads = len(machine.available_cpus())
    found = f"{facts['cpu']}, {facts['physical_cores']} cores, {threads} threads, {level or 'no known vector unit'}"
    if level is None:
        return Check("cpu", "fail", found, "an x86-64 CPU with SSE4.2, or an ARM one with NEON, is needed")
    if level in ("sse4_2", "asimd"):
        return Check("cpu", "warn", found, "generated code is tuned for AVX2 and AVX-512; here it will be slower")
    return Check("cpu", "ok", found)


def _memory() -> Check:
    import psutil

    available = psutil.virtual_memory().available
    found = f"{available / 1e9:.1f} GB available"
    if available < _ENOUGH_MEMORY_BYTES:
        return Check("memory", "warn", found, "training may run out of memory; 2 GB are enough for the shipped spaces")
    return Check("memory", "ok", found)


def _load() -> Check:
    load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    found = f"{load:.1f} processes run on {cpus} CPUs"
    if load > cpus:
        return Check("load", "warn", found, "measured latencies will be noisy while other programs run")
    return Check("load", "ok", found)


def _cache() -> Check:
    from codegen import machine

    folder = machine.cache_directory()
    return _writable("cache folder", folder, "set NAS_CACHE_DIR to a folder that can be written")


def _temporary() -> Check:
    """Generated code is loaded from the temporary folder, which some systems mount without execution."""
    folder = Path(tempfile.gettempdir())
    check = _writable("temporary folder", folder, "set TMPDIR to a folder that can be written")
    if check.status != "ok":
        return check
    flags = os.statvfs(folder).f_flag
    if flags & os.ST_NOEXEC:
        return Check(check.name, "fail", f"{folder} forbids execution", "set TMPDIR to another folder")
    return check


def _writable(name: str, folder: Path, hint: str) -> Check:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"nas")
    except OSError as error:
        return Check(name, "fail", f"{folder}: {error.strerror}", hint)
    return Check(name, "ok", str(folder))


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 1e9:.1f} GB free here"
    if free < _ENOUGH_DISK_BYTES:
        return Check("disk", "warn", found, "a study keeps the weights of every trial; 1 GB is enough for most")
    return Check("disk", "ok", found)


def _bench_extra() -> Check:
    missing = [name for name in _BENCH if importlib.util.find_spec(name) is None]
    if missing:
        hint = "only for `nas bench --against onnxruntime,openvino`: pip install 'nas[bench]'"
        return Check("bench extra", "warn", f"not installed: {', '.join(missing)}", hint)
    return Check("bench extra", "ok", ", ".join(f"{name} {metadata.version(name)}" for name in _BENCH))


def _builds(run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> Check:
    """Compile something small, end to end."""
    command = [sys.executable, "-c", _TRIAL_BUILD]
    try:
        process = run(command, capture_output=True, text=True, timeout=_COMPILE_LIMIT_S, cwd=Path(__file__).parents[2])
    except subprocess.TimeoutExpired:
        return Check("code generation", "fail", f"no result after {_COMPILE_LIMIT_S:g} s")
    lines = (process.stdout if process.returncode == 0 else process.stderr).strip().splitlines()
    last = lines[-1] if lines else f"exit code {process.returncode}"
    if process.returncode == 0:
        return Check("code generation", "ok", last)
    return Check("code generation", "fail", last, "NAS_DEBUG=1 nas compile tiny_lm shows where")
