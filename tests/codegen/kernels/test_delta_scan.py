"""The fused delta rule over decays, states, block sizes and odd sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.delta_scan import DeltaScanKernel
from tests.codegen.kernels import checking
from tests.codegen.kernels.batches import ISAS, check_all

KERNELS = {
    "plain": DeltaScanKernel(1, 7, 2, 16, 16),
    "decay_of_heads": DeltaScanKernel(2, 5, 3, 5, 7, decay="head", scale=0.4),
    "decay_of_keys": DeltaScanKernel(1, 9, 2, 20, 33, decay="key", initial_state=True, final_state=True),
    "states": DeltaScanKernel(2, 6, 1, 9, 70, decay="head", initial_state=True, final_state=True),
    "step": DeltaScanKernel(1, 1, 2, 16, 20, decay="head", initial_state=True, final_state=True),
    "first_step": DeltaScanKernel(1, 1, 1, 3, 5),
    "last_state_of_an_odd_length": DeltaScanKernel(1, 11, 1, 8, 40, final_state=True),
    "many_values": DeltaScanKernel(1, 33, 1, 64, 160, decay="key"),
}


def delta_inputs(kernel: DeltaScanKernel, seed: int = 0) -> list[np.ndarray]:
    """Random operands with keys of unit length, decays below 1 and betas in (0, 1), as models make them."""
    q, k, v, *rest = checking.random_inputs(kernel, seed)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = 1 if kernel.decay != "none" else 0
    rest[beta] = 1 / (1 + np.exp(-rest[beta]))
    if beta:
        rest[0] = -np.abs(rest[0])
    return [q, k, v, *rest]


INPUTS = {name: delta_inputs(kernel) for name, kernel in KERNELS.items()}


@pytest.mark.parametrize("isa", ISAS)
def test_delta_scan_equals_reference(isa: str) -> None:
    """Every decay, state and size gives the float64 loop's result."""
    check_all(KERNELS, isa, inputs=INPUTS)


def test_every_knob_computes_the_same() -> None:
    """Blocks of one to four steps and parts of every width give one result."""
    kernel = DeltaScanKernel(1, 11, 1, 5, 20, decay="key", initial_state=True, final_state=True)
    check_all({"all": kernel}, "avx2", inputs={"all": delta_inputs(kernel)}, every_knob=True)


def test_state_carries_over() -> None:
    """Two parts of odd length with the state handed on equal the whole sequence."""
    whole = DeltaScanKernel(1, 12, 2, 8, 12, decay="head", initial_state=True, final_state=True)
    *steps, state = delta_inputs(whole)
    target = checking.target_of("avx2")
    expected = checking.run(whole, [*steps, state], target)
    outputs = []
    for part in (slice(0, 5), slice(5, 12)):
        kernel = replace(whole, t=part.stop - part.start)
        found, state = checking.run(kernel, [*(array[:, part].copy() for array in steps), state], target)
        outputs.append(found)
    # Blocks begin at other steps, so rounding differs.
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected[0], atol=1e-5)
    np.testing.assert_allclose(state, expected[1], atol=1e-5)


def test_a_key_written_twice_reads_back_the_last_value() -> None:
    """With beta = 1 and unit keys the state is a memory that forgets what it held under the same key."""
    kernel = DeltaScanKernel(1, 2, 1, 4, 8)
    key = np.eye(4, dtype=np.float32)[None, [1, 1], None]
    values = np.arange(16, dtype=np.float32).reshape(1, 2, 1, 8)
    (found,) = checking.run(kernel, [key, key, values, np.ones((1, 2, 1), np.float32)], checking.target_of("avx2"))
    np.testing.assert_array_equal(found, values)


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 3), st.integers(1, 40), st.integers(1, 70)),
    decay=st.sampled_from(["none", "head", "key"]),
    states=st.tuples(st.booleans(), st.booleans()),
    isa=st.sampled_from(checking.ISAS),
)
@settings(max_examples=8)
def test_delta_scan_holds_for_random_shapes(sizes: Any, decay: Any, states: tuple[bool, bool], isa: str) -> None:
    """The float32 error stays within 1e-5 of the output's scale for any shape."""
    kernel = DeltaScanKernel(*sizes, decay=decay, initial_state=states[0], final_state=states[1])
    checking.check(kernel, isa, inputs=delta_inputs(kernel))
