"""The CUDA compiler of this machine, which needs no GPU: finding it, compiling, and what TVM needs beside it.

`nvcc` is taken from `CUDA_HOME`, the search path or the wheels that `make cuda-deps` installs into the environment.
TVM's CUDA part also wants the driver's library. Where there is none, a stub with the same names stands in while code
is generated: every function of it fails, so nothing can mistake it for a driver.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from codegen import machine
from ir.errors import CompileError, TargetUnavailable

TIMEOUT_S: Final = 300.0
"""Bound on one run of the compiler."""
RUNTIME_LIBRARY: Final = "libcudart.so.13"
"""The CUDA runtime that TVM's CUDA part was linked with."""
HINT: Final = "`make cuda-deps` installs the CUDA compiler into this environment, no GPU is needed; or set CUDA_HOME"

_DRIVER: Final = "libcuda.so.1"
# What libtvm_runtime_cuda.so leaves undefined of the driver's interface.
_DRIVER_FUNCTIONS: Final = (
    *("cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx"),
    *("cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled"),
)
_NO_DEVICE: Final = 100  # CUDA_ERROR_NO_DEVICE
_TOP: Final = re.compile(r"^#\$ TOP=(\S+)", re.MULTILINE)
_ELF_CUDA: Final = b"\xbe\x00"  # e_machine of code for NVIDIA GPUs, 190
_FATBIN_MAGIC: Final = b"\x50\xed\x55\xba"


def find() -> Path | None:
    """Return the CUDA compiler, None where there is none."""
    home = os.environ.get("CUDA_HOME")
    known = [Path(home) / "bin" / "nvcc"] if home else []
    if on_path := shutil.which("nvcc"):
        known.append(Path(on_path))
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        known.append(Path(folder) / "cu13" / "bin" / "nvcc")
    return next((path for path in known if os.access(path, os.X_OK)), None)


def require() -> Path:
    """Return the CUDA compiler.

    Raises:
        TargetUnavailable: There is none.
    """
    found = find()
    if found is None:
        raise TargetUnavailable("there is no CUDA compiler", where="cuda", expected="nvcc 13", hint=HINT)
    return found


def compile_source(source: str, architectures: Sequence[str], *, options: Sequence[str] = ()) -> tuple[bytes, str]:
    """Compile CUDA C++ to a fatbin with machine code for each architecture.

    Args:
        source: Text of the program; headers of `codegen/gpu/cuda/sources` are found.
        architectures: Names such as `sm_90a`.
        options: Further options of the compiler.

    Returns:
        The fatbin, and what the compiler said.

    Raises:
        TargetUnavailable: There is no compiler.
        CompileError: It refuses.
    """
    codes = [f"-gencode=arch=compute_{name[3:]},code={name}" for name in architectures]
    include = Path(__file__).parent / "sources"
    with tempfile.TemporaryDirectory(prefix="nas-") as folder:
        (Path(folder) / "kernel.cu").write_text(source)
        command = [str(require()), "--fatbin", "-O3", "-std=c++17", f"-I{include}", *codes, *options]
        said = _run([*command, "-o", "kernel.fatbin", "kernel.cu"], folder)
        return (Path(folder) / "kernel.fatbin").read_bytes(), said


def _run(command: Sequence[str], folder: str) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise CompileError("the compiler ran out of time", where=command[0], expected=f"{TIMEOUT_S:g} s") from None
    if done.returncode:
        raise CompileError("the compiler refuses", where=command[0], found=(done.stderr or done.stdout)[-4000:])
    return done.stdout + done.stderr


def worker_environment() -> dict[str, str]:
    """Return the variables of a process in which TVM generates machine code for GPUs, with or without one here.

    Raises:
        TargetUnavailable: There is no CUDA compiler, or it lacks the runtime's library.
    """
    compiler = require()
    libraries = [str(_runtime_folder(str(compiler)))]
    if not _has_driver():
        libraries.append(str(_stub_folder()))
    usual = os.environ.get("LD_LIBRARY_PATH")
    return {
        "PATH": f"{compiler.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *([usual] if usual else [])]),
        "TVM_CUDA_COMPILE_MODE": "nvcc",
        "TVM_CUDA_NVCC_NO_FAST_MATH": "1",  # its exponentials alone use up the tolerance of a verification
    }


def architectures_of(library: bytes) -> list[str]:
    """List the architectures whose machine code a library or fatbin holds; `sm_90` stands for `sm_90a` too."""
    found: set[str] = set()
    start = library.find(_FATBIN_MAGIC)
    while start >= 0:
        end = library.find(_FATBIN_MAGIC, start + 4)
        found |= _codes(library[start : end if end >= 0 else len(library)])
        start = end
    return sorted(found)


def _codes(fatbin: bytes) -> set[str]:
    """Read the ELF headers of GPU code inside a fatbin: bits 8 to 15 of the flags are the architecture (ABI 8)."""
    found: set[str] = set()
    start = fatbin.find(b"\x7fELF")
    while start >= 0:
        header = fatbin[start : start + 64]
        if header[18:20] == _ELF_CUDA:
            flags = int.from_bytes(header[48:52], "little")
            found.add(f"sm_{flags >> 8 & 0xFF}")
        start = fatbin.find(b"\x7fELF", start + 4)
    return found


def _has_driver() -> bool:
    places = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    usual = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib/wsl/lib")
    return any((Path(place) / _DRIVER).exists() for place in (*filter(None, places), *usual))


@functools.cache
def _runtime_folder(compiler: str) -> Path:
    listed = subprocess.run([compiler, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    match = _TOP.search(listed.stderr)
    top = Path(match[1]) if match else Path(compiler).parent.parent
    found = next((top / name for name in ("lib64", "lib") if (top / name / RUNTIME_LIBRARY).exists()), None)
    if found is None:
        raise TargetUnavailable(
            "the CUDA runtime is missing beside the compiler", where=str(top), expected=RUNTIME_LIBRARY, hint=HINT
        )
    return found.resolve()


@functools.cache
def _stub_folder() -> Path:
    """Return a folder with a driver's library all of whose functions fail; made once for a cache folder."""
    source = "".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in _DRIVER_FUNCTIONS)
    folder = machine.cache_directory() / "cuda-stub" / hashlib.sha256(source.encode()).hexdigest()[:12]
    if (folder / _DRIVER).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nas-", dir=folder) as scratch:
        (Path(scratch) / "stub.c").write_text(source)
        _run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{_DRIVER}", "-o", _DRIVER, "stub.c"], scratch)
        os.replace(Path(scratch) / _DRIVER, folder / _DRIVER)
    return folder
