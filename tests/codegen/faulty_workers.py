"""Stand-ins for `build.build_and_run` that go wrong in a worker process; importable there, so free of torch."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from codegen import build


def crash(*_: Any) -> None:
    """Read address zero, as broken generated code does."""
    ctypes.string_at(0)


def hang(*_: Any) -> None:
    """Sleep in C with the interpreter locked."""
    ctypes.PyDLL(None).sleep(1000)


def stumble(*_: Any) -> None:
    """Raise what nobody foresaw."""
    raise KeyError("Value(node=3, index=0)")


def wrong_result(*arguments: Any) -> tuple[build.BuiltModel, dict[str, dict[str, np.ndarray]]]:
    """Build properly, but return outputs that are a thousandth off."""
    built, found = build.build_and_run(*arguments)
    assert found is not None
    return built, {
        name: {key: array * np.float32(1.001) for key, array in outputs.items()} for name, outputs in found.items()
    }


def one_nan(*arguments: Any) -> tuple[build.BuiltModel, dict[str, dict[str, np.ndarray]]]:
    """Build properly, but return one NaN."""
    built, found = build.build_and_run(*arguments)
    assert found is not None
    for outputs in found.values():
        for array in outputs.values():
            array.flat[0] = np.nan
    return built, found
