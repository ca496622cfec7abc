"""Reads a YAML file into plain data that remembers where every piece of it stands.

Search spaces are data from strangers: the file's size, its nesting and what its aliases expand to are all bounded,
and every complaint carries `file:line:column`. Scalars follow YAML 1.2 (`no` is a word, `010` is ten) with
underscores in numbers.
"""

# PyYAML's type stubs leave much of the loader untyped:
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard, cast

import yaml

from ir.errors import SpaceError

DataPath: TypeAlias = tuple[str | int, ...]

MAX_FILE_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 10_000  # after aliases are expanded; the largest space we ship has a few hundred
MAX_MAGNITUDE = 2**53  # the largest range in which every integer is also exact as a float

_TAG = "tag:yaml.org,2002:"
_NO_MARK = (1, 1)


def is_mapping(value: object) -> TypeGuard[dict[str, Any]]:
    """Tell whether a parsed value is a mapping; its keys are always text."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Tell whether a parsed value is a list."""
    return isinstance(value, list)


def format_path(path: DataPath) -> str:
    """Write a path as it reads in messages: `block.token_mixer.choice[1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass(frozen=True)
class Source:
    """Parsed data and the place of each piece of it.

    Attributes:
        label: File name as the user gave it, or `<dict>` for data from Python.
        data: Plain dictionaries, lists and scalars.
        values: Line and column, from 1, where the value at a path begins.
        keys: The same for the key that leads to it.
    """

    label: str
    data: dict[str, Any]
    values: Mapping[DataPath, tuple[int, int]] = field(default_factory=dict[DataPath, tuple[int, int]])
    keys: Mapping[DataPath, tuple[int, int]] = field(default_factory=dict[DataPath, tuple[int, int]])

    def resolve(self, location: DataPath) -> DataPath:
        """Return the path in the file of a location in the schema, whose extra parts the file does not have."""
        path: list[str | int] = []
        node: Any = self.data
        for part in location:
            if is_mapping(node) and part in node:
                node = node[str(part)]
            elif is_list(node) and isinstance(part, int) and part < len(node):
                node = node[part]
            else:
                continue
            path.append(part)
        return tuple(path)

    def place(self, path: DataPath, *, at_key: bool = False) -> tuple[int, int] | None:
        """Return line and column of `path`, or of its closest ancestor in the file; None for data from Python."""
        if at_key and path in self.keys:
            return self.keys[path]
        for length in range(len(path), -1, -1):
            if path[:length] in self.values:
                return self.values[path[:length]]
        return None

    def where(self, path: DataPath, *, at_key: bool = False) -> str:
        """Return `file:line:column` of a path, the label alone for data from Python."""
        place = self.place(path, at_key=at_key)
        return f"{self.label}:{place[0]}:{place[1]}" if place else self.label

    def error(
        self,
        message: str,
        path: DataPath,
        *,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
        at_key: bool = False,
    ) -> SpaceError:
        """Return the error to raise about the value, or the key, at `path`."""
        text = f"{format_path(path)}: {message}" if path else message
        return SpaceError(text, where=self.where(path, at_key=at_key), expected=expected, found=found, hint=hint)


def read_yaml(path: Path) -> Source:
    """Read a YAML file; messages call it by the path given.

    Raises:
        SpaceError: The file cannot be read, is not YAML, is not a mapping, or breaks a bound of this module.
    """
    return parse_yaml(_read_text(path, str(path)), str(path))


def parse_yaml(text: str, label: str) -> Source:
    """Parse YAML text; `label` is what messages call it.

    Raises:
        SpaceError: As `read_yaml`.
    """
    root = _compose(text, label)
    converter = _Converter(label)
    data = converter.convert(root, ())
    if not is_mapping(data):
        raise SpaceError(
            "a search space is a mapping of keys to values",
            where=_where(label, root.start_mark),
            expected="keys such as `schema:`, `name:`, `model:`, `block:`",
            found=_describe(data),
            hint="start the file with `schema: 1`",
        )
    return Source(label, data, converter.values, converter.keys)


def _read_text(path: Path, label: str) -> str:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SpaceError(
            "cannot read the search space",
            where=label,
            expected="a readable YAML file",
            found=(error.strerror or str(error)).lower(),
            hint="check the path and its permissions",
        ) from error
    if len(raw) > MAX_FILE_BYTES:
        raise SpaceError(
            "the file is too large for a search space",
            where=label,
            expected=f"at most {MAX_FILE_BYTES} bytes",
            found=f"more than {MAX_FILE_BYTES} bytes",
            hint="is this the right file?",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SpaceError(
            "the file is not UTF-8 text",
            where=f"{label}:{line}",
            expected="UTF-8",
            found=f"byte 0x{raw[error.start]:02x}",
            hint="save the file as UTF-8",
        ) from error


class _Loader(yaml.BaseLoader):
    """A loader that resolves only the scalars below and bounds nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.depth >= MAX_DEPTH:
            mark = cast(yaml.Mark, self.peek_event().start_mark)
            raise yaml.MarkedYAMLError(None, None, f"nesting more than {MAX_DEPTH} levels deep", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
)
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), [c.replace("\0", "") for c in _first])


def _where(label: str, mark: yaml.Mark | None) -> str:
    return f"{label}:{mark.line + 1}:{mark.column + 1}" if mark else label


def _compose(text: str, label: str) -> yaml.Node:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise SpaceError(
            "the file is not valid YAML",
            where=_where(label, error.problem_mark or error.context_mark),
            expected="one YAML document",
            found=_problem(error),
            hint=_syntax_hint(error),
        ) from error
    except yaml.reader.ReaderError as error:
        raise SpaceError(
            "the file holds a character that YAML does not allow",
            where=f"{label}:{text.count(chr(10), 0, error.position) + 1}",
            expected="printable text",
            found=f"character 0x{ord(text[error.position]):02x}",
            hint="is this a binary file?",
        ) from error
    if root is None:
        end = cast(yaml.Mark, loader.get_mark())
        raise SpaceError(
            "the file is empty",
            where=_where(label, end),
            expected="keys such as `schema:`, `name:`, `model:`, `block:`",
            found="nothing",
            hint="start from searchspaces/tiny_lm.yaml",
        )
    return root


def _problem(error: yaml.MarkedYAMLError) -> str:
    words = f"{error.problem} {error.context or ''}".strip().replace("character '\\t'", "a tab")
    return words.removeprefix("but ").removeprefix("found ")


def _syntax_hint(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or ""
    if "\\t" in problem:
        return "indent with spaces"
    if "another document" in problem:
        return "keep one space per file: remove the `---` and what follows"
    if "undefined alias" in problem:
        return "define the anchor `&name` before its alias `*name`"
    if "nesting" in problem:
        return "a search space needs fewer than ten levels"
    return "check indentation, colons, brackets and quotes just before this place"


def _describe(value: object) -> str:
    if value is None:
        return "nothing"
    if is_list(value):
        return "a list"
    return f"`{value}`"


class _Converter:
    """Turns composed nodes into plain data, noting places as it goes."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.values: dict[DataPath, tuple[int, int]] = {}
        self.keys: dict[DataPath, tuple[int, int]] = {}
        self._open: set[int] = set()
        self._count = 0

    def convert(self, node: yaml.Node, path: DataPath) -> Any:
        self._count += 1
        if self._count > MAX_NODES:
            raise self._error(
                node,
                "the file expands to too many values",
                expected=f"at most {MAX_NODES} values once aliases are expanded",
                found=f"more than {MAX_NODES}",
                hint="write fewer aliases `*name` of aliases",
            )
        if len(path) > MAX_DEPTH:
            raise self._error(
                node,
                "aliases nest too deep",
                expected=f"at most {MAX_DEPTH} levels once aliases are expanded",
                found=f"more than {MAX_DEPTH}",
                hint="write fewer aliases `*name` of aliases",
            )
        if id(node) in self._open:
            raise self._error(
                node,
                "an anchor contains itself",
                expected="a tree of values",
                found=f"a cycle through `{format_path(path)}`",
                hint="remove the alias `*name` that points back to its own anchor `&name`",
            )
        self._open.add(id(node))
        self.values[path] = _line_column(node)
        result = self._convert_by_kind(node, path)
        self._open.remove(id(node))
        return result

    def _convert_by_kind(self, node: yaml.Node, path: DataPath) -> Any:
        if isinstance(node, yaml.MappingNode):
            self._check_tag(node, "map")
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, "seq")
            return [self.convert(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _check_tag(self, node: yaml.Node, *allowed: str) -> None:
        if node.tag not in [_TAG + name for name in allowed]:
            raise self._error(
                node,
                "YAML tags are not allowed",
                expected="a plain value",
                found=f"the tag `{node.tag.replace(_TAG, '!!')}`",
                hint="remove the tag",
            )

    def _mapping(self, node: yaml.MappingNode, path: DataPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            place = _line_column(key_node)
            if key in result:
                raise self._error(
                    key_node,
                    f"the key `{format_path((*path, key))}` is given twice",
                    expected="each key once",
                    found=f"lines {self.keys[(*path, key)][0]} and {place[0]}",
                    hint="remove one of the two",
                )
            self.keys[(*path, key)] = place
            result[key] = self.convert(value_node, (*path, key))
        return result

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(
                node,
                "a key must be a word",
                expected="`key: value`",
                found="a list or mapping as key",
                hint="name the key",
            )
        if node.value == "<<" and node.style is None:
            raise self._error(
                node, "merge keys are not supported", expected="plain keys", found="`<<`", hint="write the keys out"
            )
        return str(node.value)

    def _scalar(self, node: yaml.Node, path: DataPath) -> bool | int | float | str | None:
        self._check_tag(node, "null", "bool", "int", "float", "str")
        text, kind = str(node.value), node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "str":
            return text
        return self._number(node, text.replace("_", ""), path)

    def _number(self, node: yaml.Node, text: str, path: DataPath) -> int | float:
        try:
            as_float = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:
            raise self._error(
                node,
                f"{format_path(path)}: not a number",
                expected="a number",
                found=f"`{text}`",
                hint="remove the tag",
            ) from error
        if not abs(as_float) <= MAX_MAGNITUDE:
            raise self._error(
                node,
                f"{format_path(path)}: {'NaN is no setting' if math.isnan(as_float) else 'the number is too large'}",
                expected=f"a finite number of magnitude at most 2^53 ({MAX_MAGNITUDE:.3g})",
                found=f"`{text if len(text) <= 24 else text[:20] + '...'}`",
                hint="write a number of ordinary size",
            )
        return int(as_float) if node.tag == _TAG + "int" else as_float  # exact below 2**53

    def _error(self, node: yaml.Node, message: str, *, expected: str, found: str, hint: str) -> SpaceError:
        where = _where(self.label, node.start_mark)
        return SpaceError(message, where=where, expected=expected, found=found, hint=hint)


def _line_column(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
