"""Load and run compiled artifacts: `.nas` files.

Needs the standard library, numpy and the TVM runtime, nothing else: neither torch nor the TVM compiler. A library is
dlopened through `tvm_ffi` and served by the Relax virtual machine of `libtvm_runtime`. A process that has
imported, or will import, the whole of TVM is served by the same shared objects.
"""

from __future__ import annotations

import importlib
import platform
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from codegen import machine, streaming
from codegen.container import Contents, TensorSpec, read
from codegen.functions import LoadedFunction, Role
from codegen.manifest import FORWARD, GPU, PREFILL, STEP
from codegen.placement import HostMemory, Memory
from codegen.streaming import State, Stream
from codegen.virtual_machine import VirtualMachine, use_threads
from ir.errors import ArtifactError, InputError

Output: TypeAlias = np.ndarray | dict[str, np.ndarray]


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


def load(
    path: str | Path, *, threads: int | None = None, self_test: bool = True, key: str | Path | None = None
) -> LoadedModel:
    """Load an artifact and make it callable.

    The file is mapped and has to stay as it is while the model is used; replacing it is harmless.

    Args:
        path: The `.nas` file.
        threads: Threads to run on; when omitted, as many as it was compiled for, if there are that many.
        self_test: Run each function once on the inputs kept inside and compare with the outputs kept inside.
        key: File with the public key whose owner must have signed the artifact; see `codegen.signing`.

    Raises:
        ArtifactError: The file is damaged, of another format, or not for this machine, or not signed with the key, or
            fails its self-test.
        InputError: `threads` does not fit this machine, or `key` holds no public key.
    """
    contents = _checked(path, key)
    count = machine.check_threads(threads) if threads is not None else _usual_threads(contents)
    model = LoadedModel(contents, count)
    if self_test:
        model.self_test()
    return model


def verify(path: str | Path, *, key: str | Path | None = None) -> VerifyReport:
    """Check everything about an artifact that can be checked on this machine.

    Args:
        path: The `.nas` file.
        key: File with the public key whose owner must have signed it.

    Raises:
        ArtifactError: The first thing that is wrong.
        InputError: `key` holds no public key.
    """
    contents = _checked(path, key)
    model = LoadedModel(contents, _usual_threads(contents))
    error = model.self_test()
    manifest = contents.manifest
    signed = "not checked; name a key with --key" if contents.signature else "none"
    checks = (
        f"format version {manifest['format_version']}",
        f"checksums of {len(contents.members)} members and of the whole file",
        f"signature: {signed if key is None else f'made with the private key of {key}'}",
        f"instruction set: {len(manifest['target']['features'])} features that the code needs are here",
        f"TVM runtime {machine.versions()['tvm']} serves code compiled by {manifest['versions']['tvm']}",
        f"self-test: the outputs of {', '.join(manifest['functions'])} within {error:.1e} of the expected ones",
    )
    return VerifyReport(contents.path, checks, error, float(manifest["self_test"]["tolerance"]), manifest)


class LoadedModel:
    """A compiled model: numpy arrays in, numpy arrays out.

    Weights and input buffers are bound once; a call copies its inputs into the buffers. Calls from several threads are
    served one after the other. Made by `load`.

    Attributes:
        manifest: What the artifact says about itself.
        functions: Every function by its name in the library.
        threads: Threads that serve a call.
    """

    def __init__(self, contents: Contents, threads: int) -> None:
        self.manifest = contents.manifest
        self.threads = threads
        self._path = contents.path
        self._lock = threading.Lock()
        memory = _memory(contents)
        vm = VirtualMachine(contents.library, str(contents.path), memory)
        weights = {name: memory.place(array) for name, array in contents.weights.items()}
        self.functions: dict[str, LoadedFunction] = {
            name: LoadedFunction(name, contents, vm, weights) for name in contents.manifest["functions"]
        }
        grouped: dict[str, list[LoadedFunction]] = {}
        for function in self.functions.values():
            grouped.setdefault(function.role, []).append(function)
        self._roles = {name: Role(functions) for name, functions in grouped.items()}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Arguments of `forward`, in order, at its smallest shape."""
        return self.role(FORWARD).first.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Results of `forward`, in order, at its smallest shape."""
        return self.role(FORWARD).first.outputs

    @property
    def prefill_lengths(self) -> tuple[int, ...]:
        """How many tokens `prefill` may read at once; empty where the artifact has none."""
        return tuple(streaming.lengths(self._roles[PREFILL])) if PREFILL in self._roles else ()

    def __call__(self, *arrays: Any, **named: Any) -> Output:
        """Run `forward`.

        Where the artifact has it for several shapes, the smallest that fits is taken; what is smaller still is padded
        with zeros where that changes nothing, and refused elsewhere.

        Args:
            *arrays: Inputs in order.
            **named: Inputs by name.

        Returns:
            The output; a dictionary by name where there are several.

        Raises:
            InputError: A name, shape, element type or value does not fit.
        """
        role = self.role(FORWARD)
        given = role.check_names(arrays, named, role.first.inputs)
        function, sizes = role.choose(given)
        return _plain(self._run(function, given, sizes))

    def step(self, *arrays: Any, state: State | None = None, **named: Any) -> tuple[Output, State]:
        """Read one token.

        Args:
            *arrays: Inputs of `step` in order, less what it carries.
            state: What the call before returned; the start of a sequence when None.
            **named: The same inputs by name.

        Returns:
            The output, and the state behind the token.

        Raises:
            InputError: The artifact has no `step`, an input does not fit, or the stream is at its end.
        """
        return self.advance(STEP, arrays, named, state)

    def prefill(self, *arrays: Any, state: State | None = None, **named: Any) -> tuple[Output, State]:
        """Read as many tokens at once as one of `prefill_lengths` says; otherwise like `step`."""
        return self.advance(PREFILL, arrays, named, state)

    def stream(self, state: State | None = None) -> Stream:
        """Begin a stream, which keeps the state.

        Raises:
            InputError: The artifact has no `step`.
        """
        self.role(STEP)
        return Stream(self, state)

    def advance(
        self,
        role: str,
        arrays: tuple[Any, ...],
        named: Mapping[str, Any],
        state: State | None,
        *,
        last_use: bool = False,
    ) -> tuple[Output, State]:
        """Read tokens, as `step` and `prefill` do.

        Args:
            role: `step` or `prefill`.
            arrays: Inputs in order.
            named: Inputs by name.
            state: As for `step`.
            last_use: Whether nobody will use `state` again; a cache in it is then extended where it is, not copied.

        Raises:
            InputError: As for `step`.
        """
        functions, state = self.role(role), state or State()
        given = functions.check_names(arrays, named, functions.first.given)
        function, sizes = functions.choose(given)
        tokens = streaming.tokens_of(function)
        streaming.check_room(function, state, tokens)
        with self._lock:
            use_threads(self.threads)
            inputs = given | streaming.start(function, state, sizes)
            function.fill(inputs, state.arrays if last_use else None)
            results, carried = function.advance(sizes, self._lock)
        return _plain(results), State(state.position + tokens, carried)

    def role(self, name: str) -> Role:
        """Return the functions of a role.

        Raises:
            InputError: There are none.
        """
        if name not in self._roles:
            raise InputError(
                f"the artifact has no function for {name}",
                where=str(self._path),
                expected=f"a model that streams, compiled with --{name}",
                found=", ".join(self.functions),
            )
        return self._roles[name]

    def prepare(self, inputs: Mapping[str, np.ndarray] | None = None, function: str = FORWARD) -> Callable[[], Any]:
        """Return the bare call for measurements: inputs bound, no checks, no copies, result not converted.

        Args:
            inputs: Values to run on; those of the self-test when omitted.
            function: Name of the function.
        """
        chosen = self.functions[function]
        if inputs is None:
            chosen.fill(chosen.example_inputs())
        else:
            role = Role([chosen])
            given = role.check_names((), inputs, chosen.inputs)
            role.choose(given)
            chosen.fill(given)
        use_threads(self.threads)
        return chosen.lend()

    def example_inputs(self) -> dict[str, np.ndarray]:
        """Return the inputs of the self-test of `forward`."""
        return self.functions[FORWARD].example_inputs()

    def expected_outputs(self) -> dict[str, np.ndarray]:
        """Return the outputs that the self-test of `forward` expects."""
        return self.functions[FORWARD].expected_outputs()

    def self_test(self) -> float:
        """Run every function on the inputs kept inside the artifact and compare with the outputs kept inside.

        Returns:
            Largest absolute difference, relative to the largest expected magnitude.

        Raises:
            ArtifactError: The difference is above the tolerance or a result is not finite.
        """
        with self._lock:
            use_threads(self.threads)
            return max(function.self_test() for function in self.functions.values())

    def _run(
        self, function: LoadedFunction, given: Mapping[str, np.ndarray], sizes: Mapping[str, int]
    ) -> dict[str, np.ndarray]:
        with self._lock:
            use_threads(self.threads)
            function.fill(given)
            return function.results(sizes)


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
    if GPU in target:
        importlib.import_module("codegen.gpu.loading").check_device(target, where)
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


def _memory(contents: Contents) -> Memory:
    target = contents.manifest["target"]
    if GPU not in target:
        return HostMemory()
    return importlib.import_module("codegen.gpu.loading").open_memory(target, str(contents.path))


def _checked(path: str | Path, key: str | Path | None) -> Contents:
    contents = read(path)
    if key is not None:
        _signing().check_signature(contents, key)
    check_machine(contents)
    return contents


def _signing() -> Any:
    """Return what checks signatures; it needs a library that loading without a key does not."""
    try:
        return importlib.import_module("codegen.signing")
    except ImportError as error:
        raise InputError(
            "signatures cannot be checked here",
            where="key",
            expected="the package cryptography",
            found=str(error),
            hint="pip install cryptography",
        ) from error


def _usual_threads(contents: Contents) -> int:
    return min(int(contents.manifest["threads"]), len(machine.available_cpus()))


def _release(version: str | None) -> str | None:
    """Return `0.27` of `0.27.0.post1`: patch releases keep the binary interface."""
    return ".".join(version.split(".")[:2]) if version else None


def _plain(results: dict[str, np.ndarray]) -> Output:
    """Return a single result as it is."""
    return next(iter(results.values())) if len(results) == 1 else results
