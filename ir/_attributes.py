"""Attribute values of operations: their declared types, checked, and their plain form for text, JSON and hashing.

The plain form uses None, bool, int, float, str and lists only: tuples become lists, bytes base64 text, a tensor type
`[dtype, [sizes]]`, an axis `[name, size]` and the body of a loop its text form. `conform` turns either form into the
exact value an operation holds.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, Literal, Union, cast

from ir.errors import GraphError, ParseError, did_you_mean
from ir.op import Op
from ir.ops.control import Body
from ir.ops.structure import Component, ComponentOptions
from ir.types import Axis, TensorType

MAX_INT: Final = 2**63
"""Integers beyond this are refused: no attribute or size needs them, and numpy cannot hold them."""

MAX_RANK: Final = 32
MAX_ELEMENTS: Final = 2**48
MAX_OPTION_DEPTH: Final = 8


@cache
def attribute_hints(kind: type[Op]) -> dict[str, Any]:
    """Declared type of each attribute of an operation, in order."""
    hints = typing.get_type_hints(kind)
    if kind is Component:
        hints["options"] = ComponentOptions
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@cache
def attribute_defaults(kind: type[Op]) -> dict[str, Any]:
    """Default of each attribute that has one."""
    fields = dataclasses.fields(kind)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def normal_attributes(op: Op) -> dict[str, Any]:
    """Attributes with exactly their declared types: `scale=1` becomes `scale=1.0`.

    Raises:
        ParseError: An attribute's value is not of its declared type.
    """
    hints = attribute_hints(type(op))
    return {name: conform(hint, getattr(op, name), f"{op.name}.{name}") for name, hint in hints.items()}


def plain_attributes(op: Op) -> dict[str, Any]:
    """Attributes in plain form, all of them but later ones with their defaults."""
    usual = _usual_later(op)
    return {name: plain(value) for name, value in normal_attributes(op).items() if name not in usual}


def op_key(op: Op, without: frozenset[str] = frozenset()) -> str:
    """A text equal for equal operations only: distinguishes 0.0 from -0.0, which `==` does not."""
    usual = _usual_later(op)
    kept = [f"{name}={value!r}" for name, value in normal_attributes(op).items() if name not in without | usual]
    return f"{op.name}({', '.join(kept)})"


def _usual_later(op: Op) -> set[str]:
    """Attributes that the first release lacked and that have their default, as everything had then."""
    defaults = attribute_defaults(type(op))
    return {name for name in op.later if getattr(op, name) == defaults[name]}


def make_op(kind: type[Op], attributes: Mapping[str, Any], where: str) -> Op:
    """An operation from plain attributes; absent ones take their defaults.

    Raises:
        ParseError: An attribute is unknown, missing or of the wrong type.
    """
    hints = attribute_hints(kind)
    for name in attributes:
        if name not in hints:
            known = ", ".join(hints) or "none"
            hint = did_you_mean(name, hints)
            raise ParseError(f"{kind.name} has no attribute '{name}'", where=where, expected=known, hint=hint)
    missing = [name for name in hints if name not in attributes and name not in attribute_defaults(kind)]
    if missing:
        raise ParseError(f"{kind.name} lacks an attribute", where=where, expected=", ".join(missing))
    return kind(**{name: _attribute(kind, name, value, where) for name, value in attributes.items()})


def _attribute(kind: type[Op], name: str, value: Any, where: str) -> Any:
    try:
        return conform(attribute_hints(kind)[name], value, where)
    except ParseError as error:
        message = f"{kind.name}.{name}: {error.message}"
        raise ParseError(message, where=where, expected=error.expected, found=error.found) from error


def plain(value: Any) -> Any:
    """The plain form of a value."""
    match value:
        case tuple():
            return [plain(item) for item in cast("tuple[Any, ...]", value)]
        case bytes():
            return base64.b64encode(value).decode()
        case TensorType():
            return [value.dtype, list(value.shape)]
        case Axis():
            return [value.name, value.size]
        case Body():
            return str(value)
        case _:
            return value


def conform(hint: Any, value: Any, where: str) -> Any:
    """The value of a declared type that `value`, plain or not, stands for.

    Raises:
        ParseError: It stands for none.
    """
    if hint is ComponentOptions:
        return _options(value, where)
    if hint in _LEAVES:
        return _LEAVES[hint](value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if type(value) is not str or value not in arguments:
            raise _wrong(where, "one of " + ", ".join(map(repr, arguments)), value)
        return value
    if origin is tuple:
        return _conform_tuple(arguments, value, where)
    if origin in (Union, types.UnionType) and len(arguments) == 2 and arguments[1] is type(None):
        return None if value is None else conform(arguments[0], value, where)
    raise GraphError("an operation declares an attribute of a type that cannot be written down", found=str(hint))


def _conform_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = _sequence(value, where)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(conform(arguments[0], item, where) for item in items)
    if len(items) != len(arguments):
        raise _wrong(where, f"a list of {len(arguments)}", value)
    return tuple(conform(hint, item, where) for hint, item in zip(arguments, items, strict=True))


def _sequence(value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(where, "a list", value)
    return tuple(cast("list[Any] | tuple[Any, ...]", value))


def _wrong(where: str, expected: str, found: Any) -> ParseError:
    text = repr(found)
    shown = text if len(text) < 80 else text[:77] + "..."
    return ParseError("wrong value", where=where, expected=expected, found=shown)


def _bool(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise _wrong(where, "true or false", value)
    return value


def _int(value: Any, where: str) -> int:
    if type(value) is not int or not -MAX_INT <= value < MAX_INT:
        raise _wrong(where, "a 64-bit integer", value)
    return value


def _float(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > 2**53):
        raise _wrong(where, "a number", value)
    return float(value)


def _str(value: Any, where: str) -> str:
    if type(value) is not str:
        raise _wrong(where, "text", value)
    return value


def _bytes(value: Any, where: str) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(_str(value, where), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _wrong(where, "base64 text", value) from error


def _tensor_type(value: Any, where: str) -> TensorType:
    if isinstance(value, TensorType):
        return value
    items = _sequence(value, where)
    if len(items) != 2:
        raise _wrong(where, "[dtype, [sizes]]", value)
    return tensor_type(_str(items[0], where), [_int(size, where) for size in _sequence(items[1], where)], where)


def tensor_type(dtype: str, sizes: list[int], where: str) -> TensorType:
    """A tensor type read from text, within bounds.

    Raises:
        ParseError: The dtype is unknown, or a size is not positive or is out of bounds.
    """
    try:
        kind = TensorType(tuple(sizes), dtype)
    except GraphError as error:
        raise ParseError(error.message, where=where, expected=error.expected, found=error.found) from error
    if kind.rank > MAX_RANK or kind.size > MAX_ELEMENTS:
        expected = f"at most {MAX_RANK} dimensions and {MAX_ELEMENTS} elements"
        raise ParseError("tensor is too large", where=where, expected=expected, found=str(kind))
    return kind


def _axis(value: Any, where: str) -> Axis:
    if isinstance(value, Axis):
        return value
    items = _sequence(value, where)
    if len(items) != 2:
        raise _wrong(where, "[name, size]", value)
    name, size = _str(items[0], where), _int(items[1], where)
    if size <= 0:
        raise _wrong(where, "a positive size", value)
    return Axis(name, size)


def _body(value: Any, where: str) -> Body:
    from ir.text import parse_graph

    if isinstance(value, Body):
        return value
    return Body(parse_graph(_str(value, where), source=where))


def _options(value: Any, where: str) -> ComponentOptions:
    options: list[tuple[str, Any]] = []
    for item in _sequence(value, where):
        pair = _sequence(item, where)
        if len(pair) != 2:
            raise _wrong(where, "[name, value]", item)
        options.append((_str(pair[0], where), _option_value(pair[1], where, 0)))
    if len({name for name, _ in options}) < len(options):
        raise _wrong(where, "distinct option names", value)
    return tuple(options)


def _option_value(value: Any, where: str, depth: int) -> Any:
    if type(value) in (list, tuple) and depth < MAX_OPTION_DEPTH:
        return tuple(_option_value(item, where, depth + 1) for item in _sequence(value, where))
    if type(value) is int:
        return _int(value, where)
    if value is None or isinstance(value, bool | float | str):
        return value
    raise _wrong(where, "none, true, false, a number, text or a list of these", value)


_LEAVES: Final[dict[Any, Callable[[Any, str], Any]]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    bytes: _bytes,
    TensorType: _tensor_type,
    Axis: _axis,
    Body: _body,
}
