"""What `codegen.runtime` needs of the package `tvm_ffi`, over the C interface of its library.

`tvm_ffi` is built for each version of Python. This module needs the two libraries alone, so a bundle runs with any.

Source: `tvm/ffi/c_api.h` of apache-tvm-ffi 0.1.14: values, object header, the cells behind it, and calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

_NONE, _INT, _BOOL, _FLOAT, _POINTER, _RAW_STRING, _SMALL_STRING = 0, 1, 2, 3, 4, 8, 11
_OBJECTS, _STRING, _FUNCTION, _TENSOR, _ARRAY, _MODULE = 64, 65, 68, 70, 71, 73
_HEADER_BYTES: Final = 24  # reference count, type, padding, deleter
_FRESH: Final = b"dltensor"
_USED: Final = b"used_dltensor"


class _Value(ctypes.Union):
    _fields_ = (("integer", ctypes.c_int64), ("number", ctypes.c_double), ("pointer", ctypes.c_void_p))


class _Any(ctypes.Structure):
    _fields_ = (("type_index", ctypes.c_int32), ("length", ctypes.c_uint32), ("value", _Value))


class _Text(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))

    def decode(self) -> str:
        return ctypes.string_at(self.data, self.size).decode(errors="replace") if self.data else ""


class Runtime:
    """The libraries of a folder; its functions have the names and meanings that they have in `tvm_ffi`.

    Args:
        folder: Where the libraries are.

    Raises:
        OSError: They are missing, or for another machine.
    """

    def __init__(self, folder: Path) -> None:
        self._ffi = ctypes.CDLL(str(folder / "libtvm_ffi.so"), ctypes.RTLD_GLOBAL)
        self._runtime = ctypes.CDLL(str(folder / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
        self.release = self._ffi.TVMFFIObjectDecRef
        self.release.argtypes = (ctypes.c_void_p,)
        self._call = self._ffi.TVMFFIFunctionCall
        self._call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)

    def get_global_func(self, name: str) -> Function:
        """Return a function of the runtime.

        Raises:
            ValueError: There is none of this name.
        """
        encoded = name.encode()
        text = _Text(ctypes.cast(ctypes.c_char_p(encoded), ctypes.c_void_p), len(encoded))
        handle = ctypes.c_void_p()
        self.check(self._ffi.TVMFFIFunctionGetGlobal(ctypes.byref(text), ctypes.byref(handle)))
        if not handle.value:
            raise ValueError(f"the TVM runtime has no function {name}")
        return Function(self, handle.value)

    def load_module(self, path: str) -> Module:
        """Open a library."""
        return self.get_global_func("ffi.ModuleLoadFromFile")(path)

    def from_dlpack(self, array: Any) -> Tensor:
        """Return a tensor that shares the memory of an array."""
        capsule, handle = array.__dlpack__(), ctypes.c_void_p()
        pointer = _capsule_pointer(capsule, _FRESH)
        self.check(self._ffi.TVMFFITensorFromDLPack(ctypes.c_void_p(pointer), 0, 0, ctypes.byref(handle)))
        _capsule_rename(capsule, _USED)  # the tensor has taken it over
        assert handle.value
        return Tensor(self, handle.value)

    def to_dlpack(self, handle: int) -> Any:
        """Return a capsule with the memory of a tensor."""
        managed = ctypes.c_void_p()
        self.check(self._ffi.TVMFFITensorToDLPack(ctypes.c_void_p(handle), ctypes.byref(managed)))
        return _capsule_new(managed, _FRESH, None)

    def call(self, handle: int, arguments: tuple[Any, ...]) -> Any:
        """Call a function object."""
        result, kept = _Any(), [self._own(argument) for argument in arguments]
        packed = (_Any * len(kept))(*map(_pack, kept))
        if self._call(handle, packed, len(kept), ctypes.byref(result)):
            raise self._raised()
        return self._unpack(result)

    def check(self, code: int) -> None:
        """Raise what a call of the C interface reports.

        Raises:
            RuntimeError: It is an error.
        """
        if code:
            raise self._raised()

    def _own(self, value: Any) -> Any:
        """Return what stays alive during a call."""
        if isinstance(value, str):
            return ctypes.c_char_p(value.encode())
        if isinstance(value, (list, tuple)):
            return self.get_global_func("ffi.Array")(*value)
        return value

    def _unpack(self, result: _Any) -> Any:
        kind, value = result.type_index, result.value
        if kind >= _OBJECTS:
            if kind == _STRING:
                text = _Text.from_address(value.pointer + _HEADER_BYTES).decode()
                self.release(value.pointer)
                return text
            return _CLASSES.get(kind, Object)(self, value.pointer)
        if kind == _SMALL_STRING:
            return bytes(value)[: result.length].decode(errors="replace")
        plain = {_NONE: None, _INT: value.integer, _BOOL: bool(value.integer), _FLOAT: value.number}
        return plain.get(kind, value.pointer)

    def _raised(self) -> RuntimeError:
        handle = ctypes.c_void_p()
        self._ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(handle))
        if not handle.value:
            return RuntimeError("the TVM runtime failed without a reason")
        kind, message = (_Text * 2).from_address(handle.value + _HEADER_BYTES)
        error = RuntimeError(f"{kind.decode()}: {message.decode()}")
        self.release(handle.value)
        return error


class Object:
    """Something of the runtime, released with this.

    Args:
        runtime: Whose it is.
        handle: Address, of which this has a reference.
    """

    type_index = _OBJECTS

    def __init__(self, runtime: Runtime, handle: int) -> None:
        self.runtime, self.handle = runtime, handle

    def __del__(self) -> None:
        self.runtime.release(self.handle)


class Function(Object):
    """A function that takes and returns numbers, text, arrays of these, and objects."""

    type_index = _FUNCTION

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        return self.runtime.call(self.handle, arguments)


class Module(Object):
    """A library with functions by name."""

    type_index = _MODULE

    def __getitem__(self, name: str) -> Function:
        found = self.runtime.get_global_func("ffi.ModuleGetFunction")(self, name, False)
        if found is None:
            raise AttributeError(f"the library has no function {name}")
        return found


class Array(Object):
    """A sequence of values."""

    type_index = _ARRAY

    def __len__(self) -> int:
        return self.runtime.get_global_func("ffi.ArraySize")(self)

    def __iter__(self) -> Iterator[Any]:
        item = self.runtime.get_global_func("ffi.ArrayGetItem")
        return iter([item(self, place) for place in range(len(self))])


class Tensor(Object):
    """An array, which numpy takes by `numpy.from_dlpack`."""

    type_index = _TENSOR

    def __dlpack__(self, **_options: Any) -> Any:
        return self.runtime.to_dlpack(self.handle)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, number = (ctypes.c_int32 * 2).from_address(self.handle + _HEADER_BYTES + 8)  # behind the data's address
        return kind, number


_CLASSES: Final = {kind.type_index: kind for kind in (Function, Module, Array, Tensor)}


def _pack(value: Any) -> _Any:
    """Return the form in which a value is passed; the value stays alive elsewhere."""
    if value is None:
        return _Any(_NONE, 0)
    if isinstance(value, bool):
        return _Any(_BOOL, 0, _Value(integer=value))
    if isinstance(value, int):
        return _Any(_INT, 0, _Value(integer=value))
    if isinstance(value, float):
        return _Any(_FLOAT, 0, _Value(number=value))
    if isinstance(value, ctypes.c_char_p):
        return _Any(_RAW_STRING, 0, _Value(pointer=ctypes.cast(value, ctypes.c_void_p).value))
    if isinstance(value, ctypes.c_void_p):
        return _Any(_POINTER, 0, _Value(pointer=value.value))
    if isinstance(value, Object):
        return _Any(value.type_index, 0, _Value(pointer=value.handle))
    raise TypeError(f"a {type(value).__name__} cannot be passed to the TVM runtime")


_capsule_new = ctypes.pythonapi.PyCapsule_New
_capsule_new.restype = ctypes.py_object
_capsule_new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_rename = ctypes.pythonapi.PyCapsule_SetName
_capsule_rename.argtypes = (ctypes.py_object, ctypes.c_char_p)
