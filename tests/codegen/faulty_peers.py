"""Runners that go wrong while they prepare, for the worker process of a comparison; they stand in for real ones."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from codegen import comparison, peer_runners
from codegen.comparison import Case
from codegen.targets.base import Target


def hang(*_: Any) -> Any:
    """Sleep in C with the interpreter locked."""
    ctypes.PyDLL(None).sleep(1000)


def crash(*_: Any) -> Any:
    """Read address zero."""
    ctypes.string_at(0)


def refuse(*_: Any) -> Any:
    """Raise what another library would."""
    raise ValueError("no such operator: Frobnicate")


def differ(module: Any, inputs: Any, setting: Any) -> Any:
    """Compute something a hundredth off."""
    call, outputs = peer_runners.eager(module, inputs, setting)
    return call, lambda: [np.float32(1.01) * array for array in outputs()]


def open_with_hang_and_crash(case: Case, path: str, target: Target, folder: str) -> float:
    """Open a session in which these two take the process down."""
    return _open_with({"compile": hang, "onnxruntime": crash}, case, path, target, folder)


def open_with_refusal_and_difference(case: Case, path: str, target: Target, folder: str) -> float:
    """Open a session in which one peer cannot run the model and another computes something else."""
    return _open_with({"openvino": refuse, "eager": differ}, case, path, target, folder)


_true_open = comparison._open


def _open_with(faults: Any, case: Case, path: str, target: Target, folder: str) -> float:
    peer_runners.RUNNERS = {**peer_runners.RUNNERS, **faults}
    return _true_open(case, path, target, folder)
