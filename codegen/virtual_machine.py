"""The TVM runtime as artifacts use it: loading a library, binding its functions, and how many threads serve a call.

`codegen.tvm_runtime` finds it.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codegen import machine, tvm_runtime
from codegen.archive import ALIGNMENT_BYTES
from codegen.placement import HostMemory, Memory
from ir.errors import ArtifactError, InputError

_POOLED_ALLOCATOR, _BIG_CORES = 2, 1
_BOUND = "nas_bound_"
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)  # what TVM raises


class VirtualMachine:
    """A library in a Relax virtual machine.

    Args:
        library: Bytes of the shared library.
        where: The file that it comes from, for errors.
        memory: Where its tensors are; the processor's own where None.

    Raises:
        ArtifactError: It cannot be loaded.
    """

    def __init__(self, library: bytes, where: str, memory: Memory | None = None) -> None:
        self._where = where
        self.memory = memory or HostMemory()
        ffi = tvm_runtime.load()
        # A private folder that is gone once the library is mapped: nobody can exchange the file, nothing is left.
        folder = tempfile.mkdtemp(prefix="nas-")
        try:
            path = Path(folder) / "library.so"
            path.write_bytes(library)
            self._machine = ffi.load_module(str(path))["vm_load_executable"]()
            devices = [word for kind in self.memory.devices for word in (kind, 0, _POOLED_ALLOCATOR)]
            self._machine["vm_initialization"](*devices)
        except (OSError, *_REFUSALS) as error:
            hint = f"if {tempfile.gettempdir()} forbids execution or is full, point TMPDIR elsewhere"
            raise self._refused("the library of the artifact cannot be loaded", error, hint) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def bind(self, function: str, arguments: Sequence[Any]) -> Callable[[], Any]:
        """Bind all arguments of a function; a call then costs 1-2 us.

        Args:
            function: Name of the function.
            arguments: Tensors of `memory`, in order.

        Raises:
            ArtifactError: The library has no such function.
        """
        try:
            self._machine["save_function"](function, f"{_BOUND}{function}", 1, *arguments)
            return self._machine[f"{_BOUND}{function}"]
        except _REFUSALS as error:
            raise self._refused(f"the library has no function '{function}'", error) from error

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a bound function for the first time, when it may turn out that it is not what the manifest says.

        Raises:
            ArtifactError: The library refuses its arguments.
        """
        try:
            return call()
        except _REFUSALS as error:
            raise self._refused("the library does not take what the manifest says", error) from error

    def _refused(self, message: str, error: BaseException, hint: str | None = None) -> ArtifactError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return ArtifactError(message, where=self._where, found=lines[-1], hint=hint)


def aligned(shape: tuple[int, ...], dtype: str | np.dtype) -> np.ndarray:
    """Allocate zeros that start on a vector boundary; numpy itself promises 16 bytes only."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


_pools = threading.local()


def use_threads(threads: int) -> None:
    """Set the size of TVM's thread pool, of which every Python thread has its own.

    The pool is created with a worker for each CPU, so that models of any number of threads can share it: it can use
    fewer than it has, never more.

    Raises:
        InputError: The pool was created smaller.
    """
    if getattr(_pools, "threads", None) == threads:
        return
    ffi = tvm_runtime.load()
    cpus = [str(cpu) for cpu in machine.available_cpus()]
    ffi.get_global_func("runtime.config_threadpool")(_BIG_CORES, threads, cpus)
    used = ffi.get_global_func("runtime.NumThreads")()
    if used < threads:
        raise InputError(
            "TVM was started with fewer threads in this process",
            expected=f"{threads} threads",
            found=str(used),
            hint=f"set TVM_NUM_THREADS={threads}, or load the artifact before using TVM for anything else",
        )
    _pools.threads = threads
