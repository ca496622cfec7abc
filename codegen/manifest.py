"""What a manifest of format version 1 must hold; anything else in it is allowed and left alone.

Standard library only. `docs/artifact-format.md` lists the keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from codegen.archive import MANIFEST, SIGNATURE, Malformed, is_name
from codegen.tensors import DTYPES

FORMAT_VERSION: Final = 1
GPU: Final = "gpu"
KNOWN_REQUIREMENTS: Final = frozenset({GPU})
"""Words that `requires` may hold; a reader that meets another one has to refuse the file.

`gpu`: kernels run on a graphics processor, which the target names.
"""

FORWARD, PREFILL, STEP = "forward", "prefill", "step"
ROLES: Final = (FORWARD, PREFILL, STEP)
BATCH, SEQ_LEN = "batch", "seq_len"
AXES: Final = (BATCH, SEQ_LEN)

LIBRARY, WEIGHTS, PARAMETERS, EXPECTED, GRAPH = (
    "library.so",
    "weights.safetensors",
    "parameters.safetensors",
    "expected.safetensors",
    "graph.json",
)
REQUIRED_MEMBERS: Final = (LIBRARY, WEIGHTS, PARAMETERS, GRAPH, EXPECTED)

_MOST_THREADS: Final = 4096
_LOOSEST: Final = 0.1
_MOST_AXES: Final = 16
_HEX: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SOME_HEX: Final = re.compile(r"[0-9a-f]{32,64}", re.ASCII)

_Check: TypeAlias = Callable[[Any, str], None]


def check_manifest(manifest: Any) -> None:
    """Check every key that this version reads, and that what they say fits together.

    Raises:
        Malformed: Something is missing or of another kind.
    """
    _MANIFEST(manifest, MANIFEST)
    members = manifest["members"]
    for name in REQUIRED_MEMBERS:
        _require(name in members, f"a member {name}", "none")
    _require(not {MANIFEST, SIGNATURE} & set(members), f"members besides {MANIFEST} and {SIGNATURE}", "one of these")
    _require(FORWARD in manifest["functions"], f"a function {FORWARD}", ", ".join(manifest["functions"]) or "none")
    for name, function in manifest["functions"].items():
        _check_function(name, function, members)
    for role in ROLES:
        _check_role(role, [function for function in manifest["functions"].values() if function["role"] == role])
    _require(
        manifest["functions"][FORWARD]["role"] == FORWARD, f"the role {FORWARD} of the function {FORWARD}", "another"
    )


def _check_function(name: str, function: Mapping[str, Any], members: Mapping[str, Any]) -> None:
    where = f"function '{name}'"
    _require(function["graph"] in members, f"a graph of {where} among the members", function["graph"])
    inputs = {spec["name"]: spec for spec in function["inputs"]}
    outputs = {spec["name"]: spec for spec in function["outputs"]}
    _require(len(inputs) == len(function["inputs"]), f"inputs of {where} with a name each", "one twice")
    _require(len(outputs) == len(function["outputs"]) > 0, f"outputs of {where} with a name each", "one twice, or none")
    for key in function["carried"]:
        both = key in inputs and key in outputs and _type(inputs[key]) == _type(outputs[key])
        _require(both, f"what {where} carries as an input and as an output", key)
    if function["role"] != FORWARD:
        given = [
            spec for spec in function["inputs"] if spec["name"] not in (*function["carried"], function["position"])
        ]
        lengths = {spec["shape"][1] if len(spec["shape"]) > 1 else 0 for spec in given}
        _require(len(lengths) == 1 and 0 not in lengths, f"inputs of {where} with tokens along axis 1", str(lengths))
    position = function["position"]
    if position is not None:
        found = inputs.get(position, {})
        _require(found.get("shape") == [] and found.get("dtype") == "int32", f"a position of {where}", position)


def _check_role(role: str, functions: Sequence[Mapping[str, Any]]) -> None:
    """Check that the functions of a role have the same inputs, in other sizes each."""
    sizes = [
        tuple((spec["name"], axis, size) for spec in function["inputs"] for axis, size in _named_axes(spec) if axis)
        for function in functions
    ]
    inputs = {tuple((spec["name"], spec["dtype"]) for spec in function["inputs"]) for function in functions}
    alike = len(inputs) < 2 and len(set(sizes)) == len(sizes)
    _require(alike, f"functions for {role} with the same inputs in other sizes each", f"{len(functions)} functions")


def _named_axes(spec: Mapping[str, Any]) -> list[tuple[str | None, int]]:
    return list(zip(spec.get("axes", ()), spec["shape"], strict=False))


def _type(spec: Mapping[str, Any]) -> tuple[Any, Any]:
    return spec["shape"], spec["dtype"]


def _require(holds: bool, expected: str, found: str) -> None:
    if not holds:
        raise Malformed(expected, str(found)[:200])


def _kind(description: str, holds: Callable[[Any], bool]) -> _Check:
    def check(value: Any, where: str) -> None:
        _require(holds(value), f"{description} at {where}", str(value))

    return check


def _optional(check: _Check) -> _Check:
    def check_unless_null(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return check_unless_null


def _each(check: _Check) -> _Check:
    def check_list(value: Any, where: str) -> None:
        _require(isinstance(value, list), f"a list at {where}", str(value))
        for number, item in enumerate(value):
            check(item, f"{where}[{number}]")

    return check_list


def _table(check: _Check, is_key: Callable[[str], bool] = lambda key: True) -> _Check:
    def check_table(value: Any, where: str) -> None:
        _require(isinstance(value, dict), f"an object at {where}", str(value))
        for key, item in value.items():
            _require(is_key(key), f"a name at {where}", key)
            check(item, f"{where}.{key}")

    return check_table


def _record(keys: Mapping[str, _Check], more: Mapping[str, _Check] | None = None) -> _Check:
    """Check an object that has all of `keys` and perhaps some of `more`; other keys are left alone."""

    def check_record(value: Any, where: str) -> None:
        _require(isinstance(value, dict), f"an object at {where}", str(value))
        missing = [key for key in keys if key not in value]
        _require(not missing, f"{', '.join(missing)} at {where}", "no such key")
        for key, check in (*keys.items(), *(more or {}).items()):
            if key in value:
                check(value[key], f"{where}.{key}")

    return check_record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any, least: int = 0, most: int = 2**62) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _check_spec(spec: Any, where: str) -> None:
    _SPEC(spec, where)
    if "axes" in spec:
        known = [axis for axis in spec["axes"] if axis is not None]
        fits = len(spec["axes"]) == len(spec["shape"]) and len(set(known)) == len(known) and set(known) <= set(AXES)
        _require(fits, f"an axis or null for each size at {where}.axes", str(spec["axes"]))


def _listed(values: Sequence[str]) -> _Check:
    return _kind(f"one of {', '.join(values)}", lambda value: value in values)


_TEXT: Final = _kind("text", lambda value: isinstance(value, str))
_FLAG: Final = _kind("true or false", lambda value: isinstance(value, bool))
_DIGEST: Final = _kind("64 hexadecimal digits", lambda value: isinstance(value, str) and bool(_HEX.fullmatch(value)))
_NUMBER: Final = _kind("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_COUNT: Final = _kind("a whole number of at least 0", _is_count)
_SHAPE: Final = _kind(
    "sizes", lambda value: isinstance(value, list) and len(value) <= _MOST_AXES and all(map(_is_count, value))
)
_SPEC: Final = _record(
    {"name": _TEXT, "shape": _SHAPE, "dtype": _listed(tuple(DTYPES.values()))},
    {"below": _COUNT, "axes": _each(_optional(_TEXT))},
)
_FUNCTION: Final = _record(
    {
        "role": _listed(ROLES),
        "inputs": _each(_check_spec),
        "outputs": _each(_check_spec),
        "weights": _each(_TEXT),
        "carried": _each(_TEXT),
        "position": _optional(_TEXT),
        "padding": _record({BATCH: _FLAG, SEQ_LEN: _FLAG}),
        "graph": _TEXT,
        "graph_hash": _kind(
            "hexadecimal digits", lambda value: isinstance(value, str) and bool(_SOME_HEX.fullmatch(value))
        ),
        "verification_error": _optional(_NUMBER),
        "kernels": _each(_record({})),
        "memory": _table(_COUNT),
    }
)
_TARGET: Final = _record(
    {
        "name": _TEXT,
        "fingerprint": _TEXT,
        "architecture": _TEXT,
        "mcpu": _TEXT,
        "isa": _TEXT,
        "features": _each(_TEXT),
    },
    {"triple": _TEXT, "gpu": _record({"kind": _TEXT, "model": _TEXT})},
)
_MANIFEST: Final = _record(
    {
        "requires": _each(_TEXT),
        "tool_version": _optional(_TEXT),
        "target": _TARGET,
        "threads": _kind(f"1 to {_MOST_THREADS}", lambda value: _is_count(value, 1, _MOST_THREADS)),
        "functions": _table(_FUNCTION, lambda name: is_name(name) and "/" not in name),
        "parameters": _table(_optional(_TEXT)),
        "versions": _record({"tvm": _TEXT, "tvm_ffi": _TEXT}),
        "self_test": _record(
            {"tolerance": _kind(f"0 to {_LOOSEST}", lambda value: _is_number(value) and 0 <= value <= _LOOSEST)},
            {"unverified": _TEXT},
        ),
        "latency": _optional(_record({})),
        "tuning_records": _each(_TEXT),
        "metadata": _record({}),
        "members": _table(_record({"bytes": _COUNT, "crc32": _COUNT, "sha256": _DIGEST}), is_name),
    }
)
