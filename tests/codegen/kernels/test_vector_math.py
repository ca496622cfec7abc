"""Accuracy of the vectorised elementary functions against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pytest

from codegen._tvm import Expr, PrimFunc
from codegen.kernels import vector_math as vm
from codegen.kernels.base import Array, Isa, Kernel, Knobs
from codegen.kernels.emit import Vectors, build_function, serial
from ir.types import TensorType
from tests.codegen.kernels import checking

SIZE = 1 << 14

FUNCTIONS: dict[str, tuple[Callable[[Expr], Expr], Callable[[Array], Array]]] = {
    **{name: (function, vm.ACTIVATION_REFERENCES[name]) for name, function in vm.ACTIVATIONS.items()},
    "exp": (vm.exp, np.exp),
    "exp2_nonpositive": (vm.exp2_nonpositive, np.exp2),
    "exp2_of_degree_5": (partial(vm.exp2_nonpositive, degree=5), np.exp2),
    "exp2_of_degree_3": (partial(vm.exp2_nonpositive, degree=3), np.exp2),
    "log": (vm.log, np.log),
    "log1p_unit": (vm.log1p_unit, np.log1p),
    "erf": (vm.erf, np.vectorize(math.erf)),
    "rsqrt": (vm.rsqrt, lambda x: 1 / np.sqrt(x)),
}


@dataclass(frozen=True)
class MapKernel(Kernel):
    """Applies one function to a vector."""

    name: str
    family: ClassVar[str] = "map"

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        return (TensorType((SIZE,)),)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        return self.inputs

    @property
    def flops(self) -> int:
        return SIZE

    def knobs(self, isa: Isa) -> Knobs:
        return {}

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        def write(x: Expr, out: Expr) -> None:
            vec = Vectors(isa.lanes)
            with serial(0, SIZE // isa.lanes) as i:
                vec.store(out, FUNCTIONS[self.name][0](vec.load(x, i * isa.lanes)), i * isa.lanes)

        return build_function(self, isa, knobs, write)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (FUNCTIONS[self.name][1](arrays[0].astype(np.float64)),)


def spread(low: float, high: float) -> np.ndarray:
    """Arguments spread evenly, and others spread evenly in magnitude down to 1e-9."""
    half = SIZE // 2
    magnitude = np.exp(np.linspace(math.log(1e-9), math.log(max(-low, high)), half))
    sign = np.where(np.arange(half) % 2, 1.0, -1.0)
    return np.clip(np.concatenate([np.linspace(low, high, half), sign * magnitude]), low, high).astype(np.float32)


# Bounds are those of the module's table: relative error, or error relative to max(|result|, floor).
CASES = {
    "exp": (spread(-86.5, 88.3), 2e-7, 0.0),
    "exp2_nonpositive": (spread(-125, 0), 2e-7, 0.0),
    "exp2_of_degree_5": (spread(-125, 0), 3e-7, 0.0),
    "exp2_of_degree_3": (spread(-125, 0), 1e-4, 0.0),
    "log": (np.exp(np.linspace(-80, 80, SIZE)).astype(np.float32), 3e-7, 1e-2),
    "log1p_unit": (spread(0, 1), 3e-7, 0.0),
    "erf": (spread(-9, 9), 6e-7, 0.0),
    "rsqrt": (np.exp(np.linspace(-80, 80, SIZE)).astype(np.float32), 3e-7, 0.0),
    "tanh": (spread(-30, 30), 5e-7, 0.0),
    "sigmoid": (spread(-86, 86), 5e-7, 0.0),
    "silu": (spread(-86, 86), 5e-7, 0.0),
    "softplus": (spread(-86, 86), 5e-7, 0.0),
    "gelu": (spread(-20, 20), 8e-7, 1.0),
    "gelu_tanh": (spread(-20, 20), 3e-7, 1.0),
    "identity": (spread(-20, 20), 0.0, 0.0),
    "relu": (spread(-20, 20), 0.0, 0.0),
    "relu2": (spread(-20, 20), 2e-7, 0.0),
}


def evaluate(name: str, isa: str, x: np.ndarray) -> np.ndarray:
    """Run one function on an array of SIZE elements."""
    return checking.run(MapKernel(name), [x], checking.target_of(isa))[0]


@pytest.mark.parametrize("isa", checking.ISAS)
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function_is_as_accurate_as_stated(name: str, isa: str) -> None:
    """Every function keeps the bound that the module's table states, at any vector width."""
    x, bound, floor = CASES[name]
    actual = evaluate(name, isa, x)
    expected = MapKernel(name).reference(x)[0]
    error = np.abs(actual - expected) / np.maximum(np.maximum(np.abs(expected), floor), 1e-37)
    assert error.max() <= bound


def test_exp_vanishes_for_masked_scores() -> None:
    """Minus infinity and every very negative number give exactly 0, and huge ones stay finite."""
    x = np.zeros(SIZE, np.float32)
    x[:6] = -np.inf, -1e30, -88.0, 0.0, 1e30, np.inf
    out = evaluate("exp", "avx2", x)
    assert out[:4].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert np.isfinite(out).all()


def test_exp2_stays_above_zero_and_below_any_weight() -> None:
    """Hidden scores get a weight that is normal (no slow denormals) and too small to count."""
    x = np.full(SIZE, -1e30, np.float32)
    x[0] = -np.inf
    assert (evaluate("exp2_nonpositive", "avx2", x) == np.float32(2.0**-125)).all()
