"""Limiting cases of recurrences, state spaces and long convolutions that no other component is the limit of."""

from __future__ import annotations

import numpy as np
import pytest

from ir.component import Case
from ir.graph import Graph
from ir.interpret import evaluate
from nas.checks.component import relative_error
from nas.checks.subjects import SCOPE, Subject, random_inputs, random_params, run
from searchspaces.token_mixers.aaren import Aaren
from searchspaces.token_mixers.depthwise_conv2d import DepthwiseConv2d
from searchspaces.token_mixers.flow_attention import FlowAttention
from searchspaces.token_mixers.gated_linear_attention import GatedLinearAttention
from searchspaces.token_mixers.legendre_memory import LegendreMemory
from searchspaces.token_mixers.mamba import Mamba
from searchspaces.token_mixers.orchid import Orchid

Array = np.ndarray
EXACT = 1e-9  # float64, sums of a few dozen terms


def made(subject: Subject) -> tuple[Graph, dict[str, Array], Array]:
    """A component's graph, random parameters by their own names, and an input."""
    graph = subject.graph()
    own = {name.removeprefix(f"{SCOPE}."): array for name, array in random_params(graph).items()}
    return graph, own, random_inputs(graph)["x"]


def outputs(graph: Graph, own: dict[str, Array], x: Array) -> Array:
    """What the graph makes of x."""
    return run(graph, {f"{SCOPE}.{name}": array for name, array in own.items()}, {"x": x})


def test_gated_linear_attention_with_shut_gates_sees_one_token():
    """With all decays 0 the state is k_t v_t^T alone: every token stands for itself."""
    subject = Subject("gla", GatedLinearAttention.create({"num_heads": 2}), Case(d_model=12))
    graph, own, x = made(subject)
    own["gate_bias"] = np.full_like(own["gate_bias"], -1e4)
    alone = subject.resized(time=1).graph()
    expected = np.concatenate([outputs(alone, own, x[:, t : t + 1]) for t in range(x.shape[1])], axis=1)
    assert relative_error(outputs(graph, own, x), expected) <= EXACT


def test_gated_linear_attention_with_open_gates_forgets_nothing():
    """With all decays 1 the last state knows no order: the last output stays when earlier tokens change places."""
    graph, own, x = made(Subject("gla", GatedLinearAttention.create({"num_heads": 2}), Case(d_model=12)))
    own["gate_bias"] = np.full_like(own["gate_bias"], 1e4)
    swapped = x[:, [3, 1, 5, 0, 4, 2, 6]]
    assert relative_error(outputs(graph, own, swapped)[:, -1], outputs(graph, own, x)[:, -1]) <= EXACT


def test_mamba_that_decays_at_once_is_its_short_convolution():
    """With A = -e^30 only the convolution's four tokens reach an output."""
    graph, own, x = made(Subject("mamba", Mamba.create({}), Case(time=9, d_model=6)))
    own["a_log"] = np.full_like(own["a_log"], 30.0)
    older = x.copy()
    older[:, :5] += 1.0
    before, after = outputs(graph, own, x), outputs(graph, own, older)
    assert np.array_equal(before[:, 8], after[:, 8])
    assert not np.allclose(before[:, 7], after[:, 7])


def test_mamba_at_rest_keeps_its_skip_alone():
    """With steps of size 0 nothing enters the state: y = (D silu(conv(u)) silu(z)) W_out, so B and C do not matter."""
    graph, own, x = made(Subject("mamba", Mamba.create({}), Case(time=9, d_model=6)))
    own["dt_bias"] = np.full_like(own["dt_bias"], -1e4)
    other = own | {name: -3.0 * own[name] for name in ("b", "c", "a_log")}
    assert np.array_equal(outputs(graph, own, x), outputs(graph, other, x))
    assert not np.allclose(outputs(graph, own, x), outputs(graph, own | {"skip": 0.0 * own["skip"]}, x))


def test_aaren_sees_a_set_of_tokens():
    """Softmax attention with a learned query: earlier tokens may change places (Feng et al. 2024)."""
    graph, own, x = made(Subject("aaren", Aaren.create({"num_heads": 2}), Case(d_model=8)))
    order = [4, 2, 0, 3, 1, 5, 6]
    assert relative_error(outputs(graph, own, x[:, order])[:, 5:], outputs(graph, own, x)[:, 5:]) <= EXACT


@pytest.mark.parametrize("causal", [False, True])
def test_flow_attention_without_preferences_is_a_mean(causal: bool):
    """Equal features make every flow equal: the mean of the values, times sigmoid(1)."""
    mixer = FlowAttention.create({"num_heads": 2}, {"causal": causal})
    graph, own, x = made(Subject("flow", mixer, Case(d_model=8)))
    own |= {name: 0.0 * own[name] for name in "qk"}
    v = x @ own["v"]
    count = np.arange(1.0, x.shape[1] + 1)[:, None]
    mean = v.cumsum(axis=1) / count if causal else np.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)
    # a millionth is added to features, so that no flow is 0
    assert relative_error(outputs(graph, own, x), mean / (1.0 + np.exp(-1.0)) @ own["out"]) <= 1e-4


def test_legendre_memory_of_a_constant_is_the_constant():
    """The first polynomial is 1: of a signal that never changes the first coefficient is its value, the others 0."""
    mixer = LegendreMemory.create({"order": 4, "theta": 6.0})
    stream = Subject("lmu", mixer, Case(batch=1, d_model=5)).step_graph(max_len=200)
    params = random_params(stream)
    x, memory = np.ones((1, 1, 5)), np.zeros((1, 1, 4))
    for t in range(200):  # longer than the 6 tokens that it reaches back
        results = evaluate(stream, {"x": x, "position": np.asarray(t, np.int32), "memory": memory}, params)
        memory = results["memory"]
    signal = np.maximum(x @ params[f"{SCOPE}.signal"] + params[f"{SCOPE}.signal_bias"], 0.0)[0, 0]
    assert signal > 0
    np.testing.assert_allclose(memory[0, 0], [signal[0], 0.0, 0.0, 0.0], atol=1e-5)  # A and B are float32


@pytest.mark.parametrize("conditioning", ["magnitude", "correlation"])
def test_orchid_turns_with_its_tokens(conditioning: str):
    """With short convolutions of one token, the rest is circular: tokens turned round give outputs turned round."""
    mixer = Orchid.create({"conditioning": conditioning, "short_width": 1, "width": 1, "features": 7})
    graph, own, x = made(Subject("orchid", mixer, Case(d_model=6)))
    expected = np.roll(outputs(graph, own, x), 3, axis=1)
    assert relative_error(outputs(graph, own, np.roll(x, 3, axis=1)), expected) <= 1e-6  # transforms in float32 tables


def test_depthwise_convolution_of_one_pixel_mixes_nothing():
    """With a kernel that is 0 but in its middle each pixel is scaled channel by channel (ConvNeXt's mixer)."""
    graph, own, x = made(Subject("conv", DepthwiseConv2d.create({"kernel_size": 7}), Case(grid=(5, 4), d_model=6)))
    kernel = np.zeros_like(own["kernel"])
    kernel[3, 3] = own["kernel"][3, 3]
    found = outputs(graph, own | {"kernel": kernel}, x)
    assert relative_error(found, x * kernel[3, 3, 0] + own["kernel_bias"]) <= EXACT
