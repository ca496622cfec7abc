"""Named arrays as bytes: the safetensors format, with every array at a multiple of 64 bytes so that it needs no copy.

safetensors knows no gaps between arrays, so what fills them is arrays too, named `__padding__.N`. Standard library and
numpy only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from codegen.archive import ALIGNMENT_BYTES, Buffer, Malformed

DTYPES: Final[Mapping[str, str]] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' names of the types that cross into TVM by DLPack from numpy; bfloat16 is held as its bits, U16."""

PADDING: Final = "__padding__."

_CODES: Final = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH_BYTES: Final = 8
_MOST_AXES: Final = 32


def write_tensors(arrays: Mapping[str, np.ndarray]) -> bytearray:
    """Return arrays in the order given, as safetensors."""
    header: dict[str, Any] = {}
    places: dict[str, int] = {}
    end = 0
    for name, array in arrays.items():
        if gap := -end % ALIGNMENT_BYTES:
            header[f"{PADDING}{len(header)}"] = _entry("U8", (gap,), end, gap)
            end += gap
        header[name], places[name] = _entry(_CODES[array.dtype.name], array.shape, end, array.nbytes), end
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % ALIGNMENT_BYTES)
    start = _LENGTH_BYTES + len(text)
    data = bytearray(start + end)
    data[:start] = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    for name, array in arrays.items():  # straight to their places: models are large
        np.frombuffer(data, array.dtype, array.size, start + places[name]).reshape(array.shape)[...] = array
    return data


def read_tensors(data: Buffer) -> dict[str, np.ndarray]:
    """Return the arrays of such bytes; they share its memory.

    Raises:
        Malformed: The bytes are something else.
    """
    view = memoryview(data)
    start = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "little")
    if start > len(view) or start % ALIGNMENT_BYTES:
        raise Malformed("the length of a safetensors header", f"{start - _LENGTH_BYTES} in {len(view)} bytes")
    header = read_json(view[_LENGTH_BYTES:start])
    if not isinstance(header, dict):
        raise Malformed("a safetensors header", type(header).__name__)
    arrays: dict[str, np.ndarray] = {}
    end = 0
    for name, fields in header.items():
        dtype, shape, size = _checked(name, fields, end)
        if start + end + size > len(view):
            raise Malformed(f"the data of tensor '{name}'", "the end of the member")
        if not name.startswith(PADDING):
            arrays[name] = np.frombuffer(view[start + end : start + end + size], dtype).reshape(shape)
        end += size
    if start + end != len(view):
        raise Malformed("the end of the tensors", f"{len(view) - start - end} bytes more")
    return arrays


def read_json(data: Buffer) -> Any:
    """Read JSON as RFC 8259 has it: UTF-8, no NaN, no key twice.

    Raises:
        Malformed: The bytes are something else.
    """
    try:
        return json.loads(str(data, "utf-8"), object_pairs_hook=_once, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        found = str(error) or "nested too deeply"
        raise Malformed("JSON", found[:200]) from error


def _entry(code: str, shape: tuple[int, ...], start: int, size: int) -> dict[str, Any]:
    return {"dtype": code, "shape": list(shape), "data_offsets": [start, start + size]}


def _checked(name: str, fields: Any, end: int) -> tuple[str, tuple[int, ...], int]:
    """Return type, shape and bytes of one entry of a header, which has to begin where the one before ends."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise Malformed(f"dtype, shape and data_offsets of tensor '{name}'", str(fields)[:80])
    dtype, shape, offsets = DTYPES.get(str(fields["dtype"])), fields["shape"], fields["data_offsets"]
    sizes = isinstance(shape, list) and len(shape) <= _MOST_AXES and all(type(n) is int and n >= 0 for n in shape)
    if dtype is None or not sizes:
        raise Malformed(f"a type and a shape of tensor '{name}'", str(fields)[:80])
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if offsets != [end, end + size] or (end % ALIGNMENT_BYTES and not name.startswith(PADDING)):
        raise Malformed(f"tensor '{name}' right after the one before, at a multiple of {ALIGNMENT_BYTES}", str(offsets))
    return dtype, tuple(shape), size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")
