"""Finding and loading the TVM runtime, without its compiler."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Final

from codegen import tvm_ctypes
from ir.errors import TargetUnavailable

NATIVE: Final = Path(__file__).parents[1] / "native"
"""Where a bundle has the runtime's libraries, beside the packages."""


@functools.cache
def load() -> Any:
    """Load the runtime and return `tvm_ffi` (which loads torch where that is installed), or what a bundle has for it.

    Raises:
        TargetUnavailable: There is none.
    """
    # Threads stay where the process put them: bound ones would also pin the caller, and torch with it, to a core.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    try:
        ffi = importlib.import_module("tvm_ffi")
    except ImportError as error:
        return _load_bundled(error)
    spec = importlib.util.find_spec("tvm")
    folders = [Path(folder) / "lib" for folder in (spec.submodule_search_locations or ())] if spec else []
    ffi.libinfo.load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=folders)
    return ffi


def _load_bundled(reason: ImportError) -> Any:
    if not NATIVE.is_dir():
        raise TargetUnavailable(
            "the TVM runtime is not installed",
            expected="the packages apache-tvm and apache-tvm-ffi, or a folder written by `nas bundle`",
            found=str(reason),
            hint="pip install --no-deps apache-tvm apache-tvm-ffi, in the versions that compiled the artifact",
        ) from reason
    try:
        return tvm_ctypes.Runtime(NATIVE)
    except OSError as error:
        raise TargetUnavailable(
            "the TVM runtime of this bundle cannot be loaded",
            where=str(NATIVE),
            expected="the processor and system that the bundle was made for",
            found=str(error),
        ) from error
