"""Turns what pydantic finds wrong with a file into one error that says where, what was expected, and what to do."""

from __future__ import annotations

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from ir.errors import SpaceError
from searchspaces.yaml_source import DataPath, Source, is_list, is_mapping

_EXAMPLES = {
    "schema": "schema: 1",
    "name": "name: my_space",
    "model": "model: {task: char_lm, d_model: 64, depth: 2}",
    "block": "block: {token_mixer: softmax_attention, channel_mixer: mlp}",
    "task": "task: char_lm",
    "d_model": "d_model: {choice: [64, 128]}",
    "depth": "depth: {range: [1, 4, 1]}",
    "token_mixer": "token_mixer: {per_layer: true, choice: [softmax_attention, mamba]}",
    "channel_mixer": "channel_mixer: {choice: [mlp, none]}",
    "choice": "choice: [...]",
    "range": "range: [low, high, step]",
}


def violation(message: str, *, expected: str, found: str, hint: str, key: str = "") -> PydanticCustomError:
    """Return an error for pydantic to collect; `key` names a key of the mapping to point at."""
    context = {"message": message, "expected": expected, "found": found, "hint": hint, "key": key}
    return PydanticCustomError("space", "{message}", context)


def first_error(error: ValidationError, source: Source) -> SpaceError:
    """Return the error to raise for the violation that stands first in the file."""
    found = [_translate(details, source) for details in error.errors(include_url=False)]
    return min(found, key=lambda placed: placed[0])[1]


def shown(value: object) -> str:
    """Show a value as YAML would, shortened."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value is None:
        return "nothing"
    if is_list(value):
        return f"a list of {len(value)}" if value else "an empty list"
    if is_mapping(value):
        return f"a mapping with {', '.join(f'`{key}`' for key in value) or 'no keys'}"
    text = f'"{value}"' if isinstance(value, str) and _looks_otherwise(value) else str(value)
    return f"`{text if len(text) <= 40 else text[:37] + '...'}`"


def _looks_otherwise(text: str) -> bool:
    """Tell whether text would read as a number, a truth value or nothing without its quotes."""
    return (
        text.lower() in ("true", "false", "null", "") or text.replace("_", "").replace(".", "").lstrip("+-").isdigit()
    )


_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of options",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "extra_forbidden": "{choice: [...]} or {range: [low, high, step]}, not both",
    "string_pattern_mismatch": "a letter, then letters, digits, `_`, `.` or `-`",
}
_MESSAGES = {"extra_forbidden": "choice and range together", "string_pattern_mismatch": "not a usable name"}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "string_too_long": ("max_length", "characters: at most"),
    "string_too_short": ("min_length", "characters: at least"),
}


def _translate(details: ErrorDetails, source: Source) -> tuple[tuple[int, int], SpaceError]:
    """Return an error to raise and its place, by which errors are ordered."""
    path = source.resolve(details["loc"])
    error = _as_space_error(details, path, source)
    key = str(details.get("ctx", {}).get("key", ""))
    place = source.place((*path, key) if key else path, at_key=bool(key))
    return place or (0, 0), error


def _as_space_error(details: ErrorDetails, path: DataPath, source: Source) -> SpaceError:
    kind, context, value = details["type"], details.get("ctx", {}), details["input"]
    if kind == "space":
        where = (*path, context["key"]) if context["key"] else path
        details_of = {name: context[name] for name in ("expected", "found", "hint")}
        return source.error(context["message"], where, at_key=bool(context["key"]), **details_of)
    if kind == "missing":
        key = str(details["loc"][-1])
        return source.error(
            f"the key `{key}` is missing",
            path,
            expected=f"`{key}:`",
            found=shown(value),
            hint=f"add `{_EXAMPLES.get(key, key + ': ...')}`",
        )
    if kind in ("too_short", "too_long"):
        wanted = f"{context['min_length']} or more" if kind == "too_short" else f"{context['max_length']}"
        wanted = "[low, high, step]" if path and path[-1] == "range" else f"{wanted} items"
        return source.error(
            "the list is empty" if not value else "the list has the wrong length",
            path,
            expected=wanted,
            found=shown(value),
            hint="list at least one value" if not value else "write low, high and step",
        )
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return source.error(
            "out of bounds",
            path,
            expected=f"{words} {context[name]:.12g}",
            found=shown(value),
            hint="choose a value within",
        )
    expected = _EXPECTED.get(kind, details["msg"])
    if "value" in details["loc"]:
        expected += ", {choice: [...]} or {range: [low, high, step]}"
    message = _MESSAGES.get(kind, "wrong type")
    return source.error(message, path, expected=expected, found=shown(value), hint=_type_hint(kind, value))


def _type_hint(kind: str, value: object) -> str:
    if isinstance(value, str) and kind in ("int_type", "float_type"):
        return "write the number without quotes or units"
    if isinstance(value, str) and kind == "bool_type":
        return "write true or false"
    return "see searchspaces/tiny_lm.yaml for an example"
