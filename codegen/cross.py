"""Libraries for other processors: linking them here, and running them here under an emulator.

An artifact's library is linked by a cross compiler. It is run by the TVM runtime of its own architecture, which
`make cross-deps` puts into the environment's folder `aarch64` (or `NAS_AARCH64_RUNTIME` names), under qemu-user. Where
one of these is missing a library is still made, and said to be unverified.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from codegen import machine, toolchain
from codegen.targets.base import Target
from ir.errors import KernelCrash, KernelTimeout, TargetUnavailable

SYSROOT: Final = "/usr/aarch64-linux-gnu"
RUNTIME_VARIABLE: Final = "NAS_AARCH64_RUNTIME"
_LIBRARIES: Final = ("libtvm_runtime.so", "libtvm_ffi.so")
WITHOUT_DEBUG: Final = ("-Wl,--strip-debug",)
"""Options of a linker that leaves out what only debuggers read: two fifths of a library."""
_PAGE_OPTION: Final = "-Wl,-z,max-page-size=16384"  # Android 15 has pages of 16 KB
_ANDROID_LIBRARIES: Final = ("m", "c")

_RUNNER: Final = r"""
// Runs a function of a library: runner LIBRARY OUTPUTS_PREFIX FUNCTION (CODE BITS SHAPE FILE)...
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

struct Memory {
  void AllocData(DLTensor* t) { t->data = std::aligned_alloc(64, (ffi::GetDataSize(*t) + 64) / 64 * 64); }
  void FreeData(DLTensor* t) { std::free(t->data); }
};

static ffi::Tensor Read(char** fields) {
  std::vector<int64_t> shape;
  std::stringstream sizes(fields[2]);
  for (std::string size; std::getline(sizes, size, ',');) shape.push_back(std::stoll(size));
  DLDataType type{static_cast<uint8_t>(std::atoi(fields[0])), static_cast<uint8_t>(std::atoi(fields[1])), 1};
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(Memory(), ffi::Shape(shape), type, DLDevice{kDLCPU, 0});
  std::ifstream file(fields[3], std::ios::binary);
  file.read(static_cast<char*>(tensor.data_ptr()), ffi::GetDataSize(tensor));
  if (!file) std::exit(3);
  return tensor;
}

static void Write(const ffi::Tensor& tensor, const std::string& path) {
  std::ofstream(path, std::ios::binary).write(static_cast<char*>(tensor.data_ptr()), ffi::GetDataSize(tensor));
}

int main(int argc, char** argv) {
  ffi::Module executable = ffi::Module::LoadFromFile(argv[1]);
  ffi::Module vm = executable->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  vm->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, 2);
  std::vector<ffi::Any> arguments;
  for (int i = 4; i + 3 < argc; i += 4) arguments.push_back(Read(argv + i));
  std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  ffi::Any result;
  vm->GetFunction(argv[3]).value().CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
  std::string prefix = argv[2];
  if (auto one = result.as<ffi::Tensor>()) {
    Write(*one, prefix + "0");
  } else {
    ffi::Array<ffi::Tensor> several = result.cast<ffi::Array<ffi::Tensor>>();
    for (size_t i = 0; i < several.size(); i++) Write(several[i], prefix + std::to_string(i));
  }
}
"""

_DLPACK_CODES: Final = {"i": 0, "u": 1, "f": 2, "b": 6}


def linker(target: Target) -> tuple[str, tuple[str, ...]]:
    """Return the command that links a library for a target, and its options.

    For Android the compiler of an NDK is taken where `TVM_NDK_CC` names one. Any other cross compiler links without
    its own C library; stubs of Android's stand in, so that the library names what it needs.

    Raises:
        TargetUnavailable: There is no cross compiler.
    """
    options = ("-shared", "-fPIC", _PAGE_OPTION, *WITHOUT_DEBUG)
    if "android" in target.triple:
        if ndk := os.environ.get("TVM_NDK_CC"):
            return ndk, options
        _require(toolchain.CROSS_COMPILER, target)
        return toolchain.CROSS_COMPILER, (
            *options,
            "-nostdlib",
            f"-L{_android_stubs()}",
            "-Wl,--no-as-needed",
            "-lm",
            "-lc",
        )
    compiler = toolchain.CROSS_COMPILER if target.architecture != platform.machine() else "g++"
    _require(compiler, target)
    return compiler, options


def why_not_run(target: Target) -> str:
    """Say what is missing to run a library for another processor here; empty where nothing is."""
    if missing := set(target.features) - machine.cpu_features() if target.architecture == platform.machine() else ():
        return f"this processor lacks {', '.join(sorted(missing))}"
    if target.triple != "aarch64-linux-gnu":
        return f"there is no TVM runtime for {target.triple} here"
    if (folder := runtime_folder()) is None:
        return "the TVM runtime for aarch64 is not installed here; `make cross-deps` does"
    tools = toolchain.find_emulator()
    if isinstance(tools, str):
        return tools
    if shutil.which("aarch64-linux-gnu-g++") is None:
        return "aarch64-linux-gnu-g++ is not installed here; on Debian: apt install g++-aarch64-linux-gnu"
    return "" if os.access(folder, os.R_OK) else f"{folder} cannot be read"


def runtime_folder() -> Path | None:
    """Return the folder with the TVM runtime for aarch64, None where there is none."""
    folder = Path(os.environ.get(RUNTIME_VARIABLE) or Path(sys.prefix) / "aarch64")
    return folder if all((folder / name).is_file() for name in _LIBRARIES) else None


def run_library(
    library: bytes,
    arguments: Sequence[np.ndarray],
    outputs: Mapping[str, tuple[tuple[int, ...], str]],
    threads: int,
    function: str = "forward",
) -> dict[str, np.ndarray]:
    """Run a function of a library for aarch64 under the emulator, in a process of its own.

    Args:
        library: The shared library.
        arguments: Inputs, then weights.
        outputs: Shape and dtype of each output by name, in order.
        threads: Threads of the runtime; no more than there are CPUs here, for those that wait spin.
        function: Its name in the library.

    Raises:
        KernelCrash: The process ended otherwise than with 0.
        KernelTimeout: It took too long.
    """
    threads = min(threads, len(machine.available_cpus()))
    folder, emulator = runtime_folder(), toolchain.find_emulator()
    assert folder is not None
    assert isinstance(emulator, tuple)
    with tempfile.TemporaryDirectory(prefix="nas-") as scratch:
        here = Path(scratch)
        (here / "library.so").write_bytes(library)
        words: list[str] = []
        for number, array in enumerate(arguments):
            (here / f"in{number}").write_bytes(np.asarray(array, order="C").tobytes())
            code = str(_DLPACK_CODES[array.dtype.kind])
            words += [code, str(array.dtype.itemsize * 8), ",".join(map(str, array.shape)), f"in{number}"]
        command = [*emulator, "-L", SYSROOT, "-E", f"LD_LIBRARY_PATH={folder}", "-E", f"TVM_NUM_THREADS={threads}"]
        _run([*command, str(_runner(folder)), "./library.so", "out", function, *words], here)
        return {
            name: np.fromfile(here / f"out{number}", dtype).reshape(shape)
            for number, (name, (shape, dtype)) in enumerate(outputs.items())
        }


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=toolchain.RUN_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise KernelTimeout(
            "the library ran out of time under the emulator", expected=f"at most {toolchain.RUN_TIMEOUT_S:g} s"
        ) from None
    if done.returncode:
        found = f"exit status {done.returncode}: {done.stderr[-2000:]}"
        raise KernelCrash("the library ended its process under the emulator", found=found)


@functools.cache
def _runner(folder: Path) -> Path:
    """Return the compiled runner; made beside the runtime, or in a temporary folder where that cannot be written."""
    digest = hashlib.sha256(_RUNNER.encode()).hexdigest()[:12]
    path = folder / f"run-{digest}"
    if path.exists():
        return path
    spec = importlib.util.find_spec("tvm_ffi")
    assert spec is not None
    assert spec.origin is not None
    include = Path(spec.origin).parent / "include"
    where = folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="nas-"))
    with tempfile.TemporaryDirectory(prefix="nas-", dir=where) as scratch:
        source = Path(scratch) / "run.cc"
        source.write_text(_RUNNER)
        made = Path(scratch) / "run"
        command = ["aarch64-linux-gnu-g++", "-std=c++17", "-O1", f"-I{include}", str(source), f"-L{folder}"]
        command += ["-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi", "-Wl,--allow-shlib-undefined", "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=toolchain.COMPILE_TIMEOUT_S)
        path = where / path.name
        os.replace(made, path)
    return path


@functools.cache
def _android_stubs() -> str:
    """Return a folder with empty libraries that have the names of Android's; gone with the process."""
    folder = tempfile.TemporaryDirectory(prefix="nas-")
    _KEPT.append(folder)
    for name in _ANDROID_LIBRARIES:
        library = f"lib{name}.so"
        options = ["-shared", "-nostdlib", f"-Wl,-soname,{library}", "-x", "c", os.devnull, "-o", library]
        subprocess.run([toolchain.CROSS_COMPILER, *options], cwd=folder.name, check=True, capture_output=True)
    return folder.name


_KEPT: Final[list[tempfile.TemporaryDirectory[str]]] = []


def _require(compiler: str, target: Target) -> None:
    if shutil.which(compiler) is None:
        raise TargetUnavailable(
            "there is no cross compiler to link a library with",
            where=target.name,
            expected=compiler,
            hint=f"on Debian: apt install {toolchain.PACKAGES}; `--format c` needs no linker here",
        )
