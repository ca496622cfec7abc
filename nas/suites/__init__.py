"""Benchmark suites: fixed models that the compiler is held against other runtimes with; a file a suite."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ir.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from ir.graph import Graph

Kind = Literal["dense", "recurrent"]


@dataclass(frozen=True)
class SuiteModel:
    """One model of a suite; its weights are initialised at random with a fixed seed.

    Attributes:
        name: What reports call it.
        build: Makes its graph, batch 1.
        kind: `recurrent` where the time grows linearly with the tokens, else `dense`.
        precision: `float32`, or `bfloat16` for products of rounded operands.
        step: Whether it reads one token and the state before it.
        inputs: Inputs that are not drawn at random, such as the position of a decode step.
    """

    name: str
    build: Callable[[], Graph]
    kind: Kind = "dense"
    precision: Literal["float32", "bfloat16"] = "float32"
    step: bool = False
    inputs: Mapping[str, int] = field(default_factory=dict[str, int])


def names() -> tuple[str, ...]:
    """Return the names of the suites."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> tuple[SuiteModel, ...]:
    """Return the models of a suite.

    Raises:
        InputError: No such suite.
    """
    if name not in names():
        known = ", ".join(names())
        raise InputError("unknown suite", where="--suite", expected=known, found=name, hint=did_you_mean(name, names()))
    models: tuple[SuiteModel, ...] = importlib.import_module(f"{__name__}.{name}").MODELS
    return models
