"""Fused recurrent scans over decays, states, views and odd sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.base import AVX2, View
from codegen.kernels.recurrence import OuterScanKernel
from codegen.kernels.selective_scan import SelectiveScanKernel
from ir.ops.recurrence import OuterScan
from tests.codegen.kernels import checking

FUSED = View(100), View(100, 32), View(100, 64), View(100, 96)

OUTER = {
    "no_decay": OuterScanKernel(1, 7, 2, 16, 16),
    "decay_of_heads": OuterScanKernel(2, 5, 3, 5, 7, decay="head"),
    "decay_of_keys": OuterScanKernel(1, 9, 2, 20, 33, decay="key", scale=0.3),
    "constant_decay": OuterScanKernel(
        1, 6, 2, 9, 64, decay="head", constant_log_decay=(-0.1, -0.01), initial_state=True, final_state=True
    ),
    "step": OuterScanKernel(1, 1, 2, 16, 20, decay="key", initial_state=True, final_state=True),
    "first_step": OuterScanKernel(1, 1, 1, 3, 5),
    "last_state_only": OuterScanKernel(1, 8, 1, 8, 40, decay="key", final_state=True),
    "first_state_only": OuterScanKernel(1, 33, 1, 64, 160, decay="key", initial_state=True),
    "windows_of_a_wider_buffer": OuterScanKernel(
        1, 12, 2, 16, 16, "head", q_view=FUSED[0], k_view=FUSED[1], v_view=FUSED[2], g_view=FUSED[3]
    ),
}

SELECTIVE = {
    "plain": SelectiveScanKernel(1, 7, 32, 16),
    "everything": SelectiveScanKernel(2, 5, 37, 5, decaying=True, scaled_input=True, skip=True, gate="silu"),
    "states": SelectiveScanKernel(1, 3, 20, 19, initial_state=True, final_state=True, skip=True),
    "step": SelectiveScanKernel(2, 1, 20, 16, decaying=True, initial_state=True, final_state=True),
    "many_states_of_heads": SelectiveScanKernel(2, 6, 10, 40, heads=3, scale=0.5, decaying=True),
    "windows_of_a_wider_buffer": SelectiveScanKernel(
        1, 9, 64, 8, c_view=View(40, 24), b_view=View(40, 16), x_view=View(128), z_view=View(128, 64), gate="silu"
    ),
}


def outer_inputs(kernel: OuterScanKernel, seed: int = 0) -> list[np.ndarray]:
    """Random operands with decays below 1."""
    inputs = checking.random_inputs(kernel, seed)
    if kernel.has_gate:
        inputs[3] = -np.abs(inputs[3])
    return inputs


def selective_inputs(kernel: SelectiveScanKernel, seed: int = 0) -> list[np.ndarray]:
    """Random operands with positive steps and negative rates."""
    inputs = checking.random_inputs(kernel, seed)
    inputs[3], inputs[4] = 0.5 * np.abs(inputs[3]), -np.abs(inputs[4])
    return inputs


@pytest.mark.parametrize("isa", checking.ISAS)
@pytest.mark.parametrize("case", OUTER)
def test_outer_scan_equals_reference(case: str, isa: str) -> None:
    """Every decay, state and size gives the float64 loop's result."""
    checking.check(OUTER[case], isa, inputs=outer_inputs(OUTER[case]))


@pytest.mark.parametrize("isa", checking.ISAS)
@pytest.mark.parametrize("case", SELECTIVE)
def test_selective_scan_equals_reference(case: str, isa: str) -> None:
    """Every fused part, state and size gives the float64 loop's result."""
    checking.check(SELECTIVE[case], isa, inputs=selective_inputs(SELECTIVE[case]))


@pytest.mark.parametrize(
    "kernel", [OUTER["decay_of_keys"], SELECTIVE["many_states_of_heads"]], ids=["outer", "selective"]
)
def test_every_knob_computes_the_same(kernel: OuterScanKernel | SelectiveScanKernel) -> None:
    """No candidate that tuning may choose changes the result."""
    inputs = outer_inputs(kernel) if isinstance(kernel, OuterScanKernel) else selective_inputs(kernel)
    space = kernel.knob_space(checking.target_of("avx2").isa)
    assert len(space) > 1
    for knobs in space[:8]:
        checking.check(kernel, "avx2", inputs=inputs, knobs=knobs)


def test_state_carries_over() -> None:
    """Two halves with the state handed on equal the whole sequence."""
    whole = OuterScanKernel(1, 10, 2, 8, 12, decay="key", initial_state=True, final_state=True)
    half, target = replace(whole, t=5), checking.target_of("avx2")
    *rows, state = outer_inputs(whole)
    expected = checking.run(whole, [*rows, state], target)
    first, state = checking.run(half, [*(array[:5].copy() for array in rows), state], target)
    second, state = checking.run(half, [*(array[5:].copy() for array in rows), state], target)
    # The same operations in the same order, but a step may be paired with another neighbour: rounding may differ.
    np.testing.assert_allclose(np.concatenate([first, second]), expected[0], atol=1e-5)
    np.testing.assert_allclose(state, expected[1], atol=1e-5)


def test_one_head_is_shared_by_the_threads() -> None:
    """With fewer heads than threads the values are split, so that no thread is idle."""
    isa = replace(checking.target_of("avx2").isa, threads=2)
    knobs = OuterScanKernel(1, 64, 1, 64, 64, decay="key").knobs(isa)
    assert 64 // isa.lanes // int(knobs["vectors"]) % 2 == 0


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 3), st.integers(1, 40), st.integers(1, 70)),
    decay=st.sampled_from(["none", "head", "key"]),
    states=st.tuples(st.booleans(), st.booleans()),
    isa=st.sampled_from(checking.ISAS),
)
@settings(max_examples=12)
def test_outer_scan_holds_for_random_shapes(sizes: Any, decay: str, states: tuple[bool, bool], isa: str) -> None:
    """The float32 error stays within 1e-5 of the output's scale for any shape."""
    kernel = OuterScanKernel(*sizes, decay=decay, initial_state=states[0], final_state=states[1])
    checking.check(kernel, isa, inputs=outer_inputs(kernel))


@pytest.mark.parametrize("decay", ["none", "head", "key", "state"])
def test_scan_means_what_the_graph_op_means(decay: Any) -> None:
    """The kernels' references equal the semantics of the graph's scan."""
    batch, t, heads, keys, values = 2, 4, 3, 5, 6
    if decay == "state":
        kernel = SelectiveScanKernel(
            batch, t, values, keys, heads=heads, scale=0.7, initial_state=True, final_state=True
        )
        inputs = selective_inputs(kernel)
    else:
        kernel = OuterScanKernel(
            batch, t, heads, keys, values, decay=decay, scale=0.7, initial_state=True, final_state=True
        )
        inputs = outer_inputs(kernel)
    shaped = [a.astype(np.float64) for a in inputs]
    shaped[:3] = [a.reshape(batch, t, heads, -1) for a in shaped[:3]]
    if decay in ("key", "state"):
        shaped[3] = shaped[3].reshape(batch, t, heads, -1)
    elif decay == "head":
        shaped[3] = shaped[3].reshape(batch, t, heads)
    out, state = OuterScan(decay=decay, scale=0.7, has_state=True).evaluate(*shaped)
    expected_out, expected_state = kernel.reference(*inputs)
    np.testing.assert_allclose(expected_out.reshape(out.shape), out, atol=1e-10)
    np.testing.assert_allclose(expected_state, state, atol=1e-10)


@pytest.mark.parametrize(("name", "streams"), [("plain", 3), ("everything", 4), ("step", 0)])
def test_selective_scan_fetches_each_of_its_streams_ahead(name: str, streams: int) -> None:
    """Rows of x, dt, z and the result; a single step has none to come."""
    kernel = SELECTIVE[name]
    text = kernel.build(AVX2, kernel.knobs(AVX2)).script()
    assert text.count("prefetch") == streams
