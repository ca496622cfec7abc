"""Functions of a loaded artifact: numpy arrays in, numpy arrays out, and which function serves which shape."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from codegen.container import Contents, TensorSpec, damaged, relative_error
from codegen.virtual_machine import VirtualMachine, aligned
from ir.errors import ArtifactError, InputError, did_you_mean


class LoadedFunction:
    """One function of a library. Weights and input buffers are bound once; a call copies its inputs into the buffers.

    Args:
        name: Its name in the library.
        contents: The artifact.
        vm: The library.
        weights: Tensors by name.

    Attributes:
        name: Its name in the library.
        role: `forward`, `prefill` or `step`.
        inputs: Arguments, in order.
        outputs: Results, in order.
        carried: Inputs that are outputs too.
        position: Input that is the number of tokens before these, if there is one.
        run: The bare call on the buffers as they are.
    """

    def __init__(self, name: str, contents: Contents, vm: VirtualMachine, weights: Mapping[str, Any]) -> None:
        contents.check_function(name)
        fields = contents.manifest["functions"][name]
        self.name, self.role = name, str(fields["role"])
        self.inputs = tuple(TensorSpec.from_dict(item) for item in fields["inputs"])
        self.outputs = tuple(TensorSpec.from_dict(item) for item in fields["outputs"])
        self.carried: tuple[str, ...] = tuple(fields["carried"])
        self.position: str | None = fields["position"]
        self._padded = frozenset(axis for axis, exact in fields["padding"].items() if exact)
        self._contents, self._vm = contents, vm
        self._buffers = tuple(aligned(spec.shape, spec.dtype) for spec in self.inputs)
        self._addresses = {spec.name: _address(array) for spec, array in zip(self.inputs, self._buffers, strict=True)}
        self._guest: weakref.ref[Carried] | None = None
        self._is_lent = False
        self._tensors = tuple(vm.memory.place(buffer) for buffer in self._buffers)
        bound = [*self._tensors, *(weights[key] for key in fields["weights"])]
        self.run: Callable[[], Any] = vm.bind(name, bound)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the axes along which the functions of its role differ."""
        return {axis: size for spec in self.inputs for axis, size in _axes(spec, spec.shape)}

    @property
    def given(self) -> tuple[TensorSpec, ...]:
        """Inputs that the caller gives, rather than the stream."""
        return tuple(spec for spec in self.inputs if spec.name not in self.carried and spec.name != self.position)

    def serves(self, sizes: Mapping[str, int]) -> bool:
        """Tell whether it gives exact results for inputs of these sizes, padded where that changes nothing."""
        own = self.sizes
        return all(size == own[axis] or (size < own[axis] and axis in self._padded) for axis, size in sizes.items())

    def fill(self, arrays: Mapping[str, np.ndarray], given_up: Mapping[str, np.ndarray] | None = None) -> None:
        """Copy inputs into the buffers, zeros behind those that are smaller.

        Args:
            arrays: They, by name; what lies in its buffer already stays there.
            given_up: What a stream carries that nobody will read again.
        """
        guest = self._guest() if self._guest else None
        if guest is not None and guest is not given_up:
            guest.leave()
        for spec, buffer in zip(self.inputs, self._buffers, strict=True):
            array = arrays[spec.name]
            if array.shape == spec.shape and _address(array) == _address(buffer):
                continue
            if array.shape != spec.shape:
                buffer[...] = 0
            np.copyto(buffer[(*map(slice, array.shape), ...)], array)
        for tensor, buffer in zip(self._tensors, self._buffers, strict=True):
            self._vm.memory.update(tensor, buffer)

    def results(self, sizes: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
        """Run on the buffers as they are; the results are the caller's, less what stands for padding."""
        named = self._named(self.run(), sizes or {})
        return {name: self._own(array) for name, array in named.items()}

    def advance(self, sizes: Mapping[str, int], lock: threading.Lock) -> tuple[dict[str, np.ndarray], Carried]:
        """Run on the buffers as they are.

        Args:
            sizes: As given.
            lock: What whoever uses the function holds.

        Returns:
            The results, and what is carried on, which stays in the buffers where it was made there.
        """
        named = self._named(self.run(), sizes)
        whole = not self._is_lent and all(self.sizes[axis] == size for axis, size in sizes.items())
        inside = {name for name in self.carried if whole and _address(named[name]) == self._addresses[name]}
        own = {name: self._own(array) if name not in inside else array for name, array in named.items()}
        carried = Carried({name: own.pop(name) for name in self.carried}, frozenset(inside), lock)
        self._guest = weakref.ref(carried)
        return own, carried

    def lend(self) -> Callable[[], Any]:
        """Return the bare call to somebody who will run it at any time, so that nothing may stay in the buffers."""
        self._is_lent = True
        return self.run

    def _own(self, array: np.ndarray) -> np.ndarray:
        """Return an array that the next call does not change."""
        return array.copy() if _address(array) in self._addresses.values() else array

    def example_inputs(self) -> dict[str, np.ndarray]:
        """Return the inputs of the self-test."""
        return {spec.name: self._contents.expected[f"{self.name}.input.{spec.name}"] for spec in self.inputs}

    def expected_outputs(self) -> dict[str, np.ndarray]:
        """Return the outputs that the self-test expects."""
        return {spec.name: self._contents.expected[f"{self.name}.output.{spec.name}"] for spec in self.outputs}

    def self_test(self) -> float:
        """Run on the inputs kept inside the artifact and compare with the outputs kept inside.

        Returns:
            Largest absolute difference, relative to the largest expected magnitude.

        Raises:
            ArtifactError: The signature or the library refuses them, or the difference is above the tolerance or not
                finite.
        """
        inputs = self.example_inputs()
        try:
            for spec in self.inputs:
                _checked_array(spec, inputs[spec.name])
        except InputError as error:
            found = error.found or error.message
            raise damaged(self._contents.path, f"inputs of the self-test that fit {self.name}", found) from error
        self.fill(inputs)
        results = self._named(self._vm.run(self.run), {})
        tolerance, worst = float(self._contents.manifest["self_test"]["tolerance"]), 0.0
        for name, expected in self.expected_outputs().items():
            same_kind = results[name].shape == expected.shape and results[name].dtype == expected.dtype
            error = relative_error(results[name], expected) if same_kind else float("inf")
            worst = max(worst, error)
            if not error <= tolerance:
                raise ArtifactError(
                    f"the self-test fails: output '{name}' of {self.name} is not what it was",
                    where=str(self._contents.path),
                    expected=f"a difference of at most {tolerance:g} of the output's scale",
                    found=f"{error:g}" if np.isfinite(error) else "values that are not finite, or of another shape",
                    hint="compile the model again on this machine",
                )
        return worst

    def _named(self, result: Any, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        several = not hasattr(result, "__dlpack__")
        tensors = list(result) if several else [result]
        if len(tensors) != len(self.outputs):
            raise ArtifactError(
                f"function '{self.name}' returns another number of results than the manifest says",
                where=str(self._contents.path),
                expected=str(len(self.outputs)),
                found=str(len(tensors)),
            )
        made: dict[str, np.ndarray] = {}
        for spec, tensor in zip(self.outputs, tensors, strict=True):
            array = self._vm.memory.fetch(tensor)
            for place, axis in enumerate(spec.axes or ()):
                if axis is not None and sizes.get(axis, spec.shape[place]) != spec.shape[place]:
                    array = np.moveaxis(np.moveaxis(array, place, 0)[: sizes[axis]], 0, place)
            made[spec.name] = array
        return made


class Carried(Mapping[str, np.ndarray]):
    """What a stream carries from one call to the next, by name; never changed for whoever reads it.

    What a function wrote over its inputs stays in its buffers, so that going on from there copies nothing. It leaves
    them when it is read, and when the function needs its buffers for another stream.

    Args:
        arrays: By name.
        inside: Those that lie in buffers of a function.
        lock: What whoever uses the function holds.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], inside: frozenset[str], lock: threading.Lock) -> None:
        self._arrays, self._inside, self._lock = dict(arrays), inside, lock

    def __getitem__(self, name: str) -> np.ndarray:
        with self._lock:
            self.leave()
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # whoever saves it gets arrays

    def seen(self) -> Mapping[str, np.ndarray]:
        """Return the arrays where they lie, for whoever holds the lock."""
        return self._arrays

    def leave(self) -> None:
        """Copy what lies in buffers; for whoever holds the lock."""
        self._arrays.update({name: self._arrays[name].copy() for name in self._inside})
        self._inside = frozenset()


class Role:
    """The functions of one role, for one shape each.

    Args:
        functions: They.

    Attributes:
        functions: They, smallest shape first.
    """

    def __init__(self, functions: Sequence[LoadedFunction]) -> None:
        self.functions = tuple(sorted(functions, key=lambda function: np.prod(list(function.sizes.values()) or [1])))

    @property
    def first(self) -> LoadedFunction:
        """The one for the smallest shape."""
        return self.functions[0]

    def choose(self, given: Mapping[str, np.ndarray]) -> tuple[LoadedFunction, dict[str, int]]:
        """Return the smallest function that serves inputs exactly, and the sizes that the inputs have.

        Raises:
            InputError: Their shapes fit none, or a value is out of range.
        """
        sizes: dict[str, int] = {}
        for spec in self.first.inputs:
            if spec.name in given:
                _measure(spec, given[spec.name], sizes)
        for function in self.functions:
            if function.serves(sizes):
                return function, sizes
        raise InputError(
            "no function of the artifact serves these sizes",
            where=", ".join(sizes),
            expected=" or ".join(_size_text(function.sizes) for function in self.functions),
            found=_size_text(sizes),
            hint="a smaller input is padded only where that changes nothing",
        )

    def check_names(self, arrays: tuple[Any, ...], named: Mapping[str, Any], specs: Sequence[TensorSpec]) -> dict:
        """Return inputs by name as arrays of the right type, given by position or by name.

        Raises:
            InputError: One is missing, unknown, there twice, of another type, or has values out of range.
        """
        names = [spec.name for spec in specs]
        signature = ", ".join(map(str, specs))
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
            found = ", ".join(given) or "none"
            raise InputError("an input is missing", where=missing[0], expected=signature, found=found)
        return {spec.name: _checked_array(spec, given[spec.name]) for spec in specs}


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _axes(spec: TensorSpec, shape: Sequence[int]) -> list[tuple[str, int]]:
    return [(axis, size) for axis, size in zip(spec.axes or (), shape, strict=False) if axis is not None]


def _size_text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items()) or "the shape that it was compiled for"


def _measure(spec: TensorSpec, array: np.ndarray, sizes: dict[str, int]) -> None:
    """Add the sizes of an input to those of the inputs before it."""
    axes = spec.axes or (None,) * len(spec.shape)
    fixed = len(array.shape) == len(spec.shape) and all(
        axis is not None or size == wanted for axis, size, wanted in zip(axes, array.shape, spec.shape, strict=True)
    )
    found = dict(_axes(spec, array.shape)) if fixed else {}
    if not fixed or 0 in found.values() or any(sizes.get(axis, size) != size for axis, size in found.items()):
        wanted = [sizes.get(axis, axis) if axis else size for axis, size in zip(axes, spec.shape, strict=True)]
        raise InputError(
            "an input has the wrong shape",
            where=spec.name,
            expected=f"[{', '.join(map(str, wanted))}]",
            found=str(list(array.shape)),
            hint="the shape is fixed when the model is compiled",
        )
    sizes.update(found)


def _checked_array(spec: TensorSpec, value: Any) -> np.ndarray:
    array = np.asarray(value)
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
