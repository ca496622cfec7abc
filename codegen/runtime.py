"""Load and run compiled artifacts: `.nas` files.

Needs the standard library, numpy and the TVM runtime, nothing else: neither torch nor the TVM compiler. A library is
dlopened through `tvm_ffi` and served by the Relax virtual machine of `libtvm_runtime`. A process that has
imported, or will import, the whole of TVM is served by the same shared objects.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from codegen import machine
from codegen.container import MEMBERS, Contents, TensorSpec, read, relative_error
from ir.errors import ArtifactError, InputError, did_you_mean

ALIGNMENT_BYTES = 64  # TVM's kAllocAlignment: generated code loads whole vectors from its arguments

_KDL_CPU, _POOLED_ALLOCATOR, _BIG_CORES = 1, 2, 1
_BOUND = "nas_bound"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found in an artifact that passed.

    Attributes:
        path: The file.
        checks: One sentence for each thing that was checked.
        max_error: Largest absolute difference from the expected outputs, relative to their scale.
        tolerance: What the difference had to stay below.
        manifest: The artifact's own description.
    """

    path: Path
    checks: tuple[str, ...]
    max_error: float
    tolerance: float
    manifest: dict[str, Any]


def load(path: str | Path, *, threads: int | None = None, self_test: bool = True) -> LoadedModel:
    """Load an artifact and make it callable.

    Args:
        path: The `.nas` file.
        threads: Threads to run on; when omitted, as many as it was compiled for, if there are that many.
        self_test: Run the model once on the inputs kept inside and compare with the outputs kept inside.

    Raises:
        ArtifactError: The file is damaged, of another format, or not for this machine, or fails its self-test.
        InputError: `threads` does not fit this machine.
    """
    contents = read(path)
    check_machine(contents)
    compiled_for = int(contents.manifest["threads"])
    available = len(machine.available_cpus())
    model = LoadedModel(
        contents, machine.check_threads(threads) if threads is not None else min(compiled_for, available)
    )
    if self_test:
        model.self_test()
    return model


def verify(path: str | Path) -> VerifyReport:
    """Check everything about an artifact that can be checked on this machine.

    Raises:
        ArtifactError: The first thing that is wrong.
    """
    contents = read(path)
    check_machine(contents)
    model = LoadedModel(contents, min(int(contents.manifest["threads"]), len(machine.available_cpus())))
    error = model.self_test()
    manifest = contents.manifest
    checks = (
        f"format version {manifest['format_version']}",
        f"checksums of {len(MEMBERS)} members and of the whole file",
        f"instruction set: {len(manifest['target']['features'])} features that the code needs are here",
        f"TVM runtime {machine.versions()['tvm']} serves code compiled by {manifest['versions']['tvm']}",
        f"self-test: {len(model.outputs)} output(s) within {error:.1e} of the expected ones",
    )
    return VerifyReport(contents.path, checks, error, float(manifest["self_test"]["tolerance"]), manifest)


class LoadedModel:
    """A compiled model: numpy arrays in, numpy arrays out.

    Weights and input buffers are bound once; a call copies its inputs into the buffers. Calls from several threads are
    served one after the other. Made by `load`.

    Attributes:
        manifest: What the artifact says about itself.
        inputs: Arguments, in order.
        outputs: Results, in order.
        threads: Threads that serve a call.
    """

    def __init__(self, contents: Contents, threads: int) -> None:
        function = contents.manifest["functions"]["forward"]
        self.manifest = contents.manifest
        self.inputs = tuple(TensorSpec.from_dict(item) for item in function["inputs"])
        self.outputs = tuple(TensorSpec.from_dict(item) for item in function["outputs"])
        self.threads = threads
        self._path = contents.path
        self._expected = contents.expected
        self._lock = threading.Lock()
        self._buffers = tuple(_aligned(spec.shape, spec.dtype) for spec in self.inputs)
        weights = [_aligned_copy(contents.weights[name]) for name in function["weights"]]
        self._run = _bind(contents, [*self._buffers, *weights])

    def __call__(self, *arrays: Any, **named: Any) -> np.ndarray | dict[str, np.ndarray]:
        """Run the model.

        Args:
            *arrays: Inputs in order.
            **named: Inputs by name.

        Returns:
            The output; a dictionary by name where there are several.

        Raises:
            InputError: A name, shape, element type or value does not fit.
        """
        given = self._checked(arrays, named)
        with self._lock:
            for buffer, array in zip(self._buffers, given, strict=True):
                np.copyto(buffer, array)
            results = self._results()
        return results[self.outputs[0].name] if len(results) == 1 else results

    def prepare(self, inputs: Mapping[str, np.ndarray] | None = None) -> Callable[[], Any]:
        """Return the bare call for measurements: inputs bound, no checks, no copies, result not converted.

        Args:
            inputs: Values to run on; those of the self-test when omitted.
        """
        given = self._checked((), inputs if inputs is not None else self.example_inputs())
        for buffer, array in zip(self._buffers, given, strict=True):
            np.copyto(buffer, array)
        _use_threads(self.threads)
        return self._run

    def example_inputs(self) -> dict[str, np.ndarray]:
        """Return the inputs of the self-test."""
        return {spec.name: self._expected[f"input.{spec.name}"] for spec in self.inputs}

    def expected_outputs(self) -> dict[str, np.ndarray]:
        """Return the outputs that the self-test expects."""
        return {spec.name: self._expected[f"output.{spec.name}"] for spec in self.outputs}

    def self_test(self) -> float:
        """Run on the inputs kept inside the artifact and compare with the outputs kept inside.

        Returns:
            Largest absolute difference, relative to the largest expected magnitude.

        Raises:
            ArtifactError: The difference is above the tolerance or a result is not finite.
        """
        outcome = self(**self.example_inputs())
        results = outcome if isinstance(outcome, dict) else {self.outputs[0].name: outcome}
        tolerance = float(self.manifest["self_test"]["tolerance"])
        worst = 0.0
        for name, expected in self.expected_outputs().items():
            error = relative_error(results[name], expected)
            worst = max(worst, error)
            if not error <= tolerance:
                raise ArtifactError(
                    f"the self-test fails: output '{name}' is not what it was when the artifact was made",
                    where=str(self._path),
                    expected=f"a difference of at most {tolerance:g} of the output's scale",
                    found=f"{error:g}" if np.isfinite(error) else "values that are not finite",
                    hint="compile the model again on this machine",
                )
        return worst

    def _results(self) -> dict[str, np.ndarray]:
        _use_threads(self.threads)
        result = self._run()
        tensors = [result] if len(self.outputs) == 1 and not _is_sequence(result) else list(result)
        return {spec.name: np.from_dlpack(tensor) for spec, tensor in zip(self.outputs, tensors, strict=True)}

    def _checked(self, arrays: tuple[Any, ...], named: Mapping[str, Any]) -> list[np.ndarray]:
        names = [spec.name for spec in self.inputs]
        signature = ", ".join(map(str, self.inputs))
        if len(arrays) > len(names):
            raise InputError("too many inputs", expected=signature, found=f"{len(arrays)} arrays")
        given = dict(zip(names, arrays, strict=False))
        for name, value in named.items():
            if name not in names:
                raise InputError("no such input", expected=signature, found=f"'{name}'", hint=did_you_mean(name, names))
            if name in given:
                raise InputError("an input is given twice", where=name, expected=signature)
            given[name] = value
        missing = [name for name in names if name not in given]
        if missing:
            raise InputError(
                "an input is missing", where=missing[0], expected=signature, found=", ".join(given) or "none"
            )
        return [_checked_array(spec, given[spec.name]) for spec in self.inputs]


def check_machine(contents: Contents) -> None:
    """Check that this processor and this TVM can run the artifact.

    Raises:
        ArtifactError: They cannot.
    """
    where, target, made_with = str(contents.path), contents.manifest["target"], contents.manifest["versions"]
    if target["architecture"] != platform.machine():
        raise ArtifactError(
            "the artifact is for another processor architecture",
            where=where,
            expected=platform.machine(),
            found=target["architecture"],
            hint="compile the model again on this machine",
        )
    if "android" in target.get("triple", "") and not hasattr(sys, "getandroidapilevel"):
        raise ArtifactError(
            "the artifact is for another operating system",
            where=where,
            expected=platform.system(),
            found="Android",
            hint="compile the model again for arm64",
        )
    missing = sorted(set(target["features"]) - machine.cpu_features())
    if missing:
        raise ArtifactError(
            "this processor lacks instructions that the artifact uses",
            where=where,
            expected=f"a processor like {target['mcpu']}, with {', '.join(missing)}",
            found="a processor without them",
            hint="compile the model again on this machine, or for a lower level such as cpu:avx2",
        )
    here = machine.versions()
    for name in ("tvm", "tvm_ffi"):
        if _release(here[name]) != _release(made_with[name]):
            raise ArtifactError(
                "the artifact was compiled for another TVM runtime",
                where=where,
                expected=f"{name} {_release(made_with[name])}",
                found=here[name] or "not installed",
                hint=f"install apache-tvm=={made_with['tvm']} apache-tvm-ffi=={made_with['tvm_ffi']}, or compile again",
            )


def _release(version: str | None) -> str | None:
    """Return `0.27` of `0.27.0.post1`: patch releases keep the binary interface."""
    return ".".join(version.split(".")[:2]) if version else None


def _checked_array(spec: TensorSpec, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.shape != spec.shape:
        raise InputError(
            "an input has the wrong shape",
            where=spec.name,
            expected=str(list(spec.shape)),
            found=str(list(array.shape)),
            hint="the shape is fixed when the model is compiled",
        )
    wanted = np.dtype(spec.dtype)
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        raise InputError(
            "an input has the wrong element type", where=spec.name, expected=str(wanted), found=str(array.dtype)
        )
    if wanted.kind in "iu" and array.size:
        low, high = int(array.min()), int(array.max())
        limit = np.iinfo(wanted).max if spec.below is None else spec.below - 1
        floor = np.iinfo(wanted).min if spec.below is None else 0
        if low < floor or high > limit:
            raise InputError(
                "an input has values out of range",
                where=spec.name,
                expected=f"{floor} to {limit}",
                found=f"{low} to {high}",
            )
    return array


def _aligned(shape: tuple[int, ...], dtype: str | np.dtype) -> np.ndarray:
    """Allocate an array that starts on a vector boundary; numpy itself promises 16 bytes only."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    copy = _aligned(array.shape, array.dtype)
    np.copyto(copy, array)
    return copy


def _is_sequence(result: Any) -> bool:
    return not hasattr(result, "__dlpack__")


def _bind(contents: Contents, arguments: list[np.ndarray]) -> Callable[[], Any]:
    """Load the library into a virtual machine and bind all arguments of its function; a call then costs 1-2 us."""
    ffi = _tvm_ffi()
    # A private folder that is gone once the library is mapped: nobody can exchange the file, nothing is left behind.
    folder = tempfile.mkdtemp(prefix="nas-")
    try:
        library = Path(folder) / "library.so"
        library.write_bytes(contents.library)
        executable = ffi.load_module(str(library))
    except (OSError, RuntimeError) as error:
        raise ArtifactError(
            "the library of the artifact cannot be loaded",
            where=str(contents.path),
            found=str(error).strip().splitlines()[-1],
            hint=f"if {tempfile.gettempdir()} forbids execution or is full, point TMPDIR elsewhere",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    vm = executable["vm_load_executable"]()
    vm["vm_initialization"](_KDL_CPU, 0, _POOLED_ALLOCATOR)
    vm["save_function"]("forward", _BOUND, 1, *(ffi.from_dlpack(array) for array in arguments))
    return vm[_BOUND]


@functools.cache
def _tvm_ffi() -> ModuleType:
    """Load the TVM runtime, without the compiler, and return `tvm_ffi` (which loads torch where that is installed)."""
    # Threads stay where the process put them: bound ones would also pin the caller, and torch with it, to a core.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    ffi = importlib.import_module("tvm_ffi")
    spec = importlib.util.find_spec("tvm")
    folders = [Path(folder) / "lib" for folder in (spec.submodule_search_locations or ())] if spec else []
    ffi.libinfo.load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=folders)
    return ffi


_pools = threading.local()


def _use_threads(threads: int) -> None:
    """Set the size of TVM's thread pool, of which every Python thread has its own.

    The pool is created with a worker for each CPU, so that models of any number of threads can share it: it can use
    fewer than it has, never more.
    """
    if getattr(_pools, "threads", None) == threads:
        return
    ffi = _tvm_ffi()
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
