"""What papers claim of token mixers on images and of reducers, beyond the limits that components state themselves."""

import numpy as np
import pytest

from ir.component import Case
from nas.checks.component import relative_error
from nas.checks.subjects import SCOPE, Subject, random_inputs, random_params, run
from searchspaces import reference
from searchspaces.reducers.evit import Evit
from searchspaces.reducers.mctf import Mctf
from searchspaces.reducers.token_transform import TokenTransform
from searchspaces.token_mixers.bidirectional_gla import BidirectionalGla
from searchspaces.token_mixers.soft_attention import SoftAttention


def test_soft_with_all_tokens_as_landmarks_is_exact_gaussian_attention():
    """C A^+ C^T with every token a landmark is the kernel itself, so Newton's inverse is one, too."""
    soft = SoftAttention.create({"num_heads": 2, "landmarks": 4, "landmark": "mean", "newton_steps": 60, "ridge": 1e-6})
    subject = Subject("soft", soft, Case(grid=(4, 3), d_model=8, batch=1))
    graph = subject.graph()
    params, x = random_params(graph), random_inputs(graph)["x"]
    own = {name.removeprefix(f"{SCOPE}."): array for name, array in params.items()}
    q, v = (np.reshape(x @ own[name] + own[f"{name}_bias"], (12, 2, 4)) for name in "qv")
    y = reference.convolve(np.reshape(v, (1, 4, 3, 8)), np.repeat(own["kernel"], 4, axis=-1), groups=8)
    for head in range(2):
        apart = ((q[:, None, head] - q[None, :, head]) ** 2).sum(axis=-1) / (2.0 * 4**0.5)
        y[..., 4 * head : 4 * head + 4] += np.reshape(np.exp(-apart) @ v[:, head], (1, 4, 3, 4))
    assert relative_error(run(graph, params, {"x": x}), y @ own["out"] + own["out_bias"]) <= 1e-3


def test_bidirectional_gla_turns_with_its_image():
    """On an image turned by half a turn, with its window turned and its gates exchanged, the output is turned."""
    subject = Subject("gla", BidirectionalGla.create({"num_heads": 2}), Case(grid=(3, 4), d_model=8))
    graph = subject.graph()
    params, x = random_params(graph), random_inputs(graph)["x"]
    turned = {
        name.replace("gate_forward", "other")
        .replace("gate_backward", "gate_forward")
        .replace("other", "gate_backward"): (array[::-1, ::-1] if name.endswith("kernel") else array)
        for name, array in params.items()
    }
    expected = run(graph, params, {"x": x})
    assert relative_error(run(graph, turned, {"x": x[:, ::-1, ::-1]})[:, ::-1, ::-1], expected) <= 1e-12
    assert relative_error(run(graph, turned, {"x": x}), expected) > 1e-3


@pytest.mark.parametrize("reducer", [Evit.create({"keep": 1.0}), TokenTransform.create({"keep": 1.0})])
def test_reducer_that_keeps_all_is_the_identity(reducer):
    """With every token kept nothing changes, to the bit."""
    graph = Subject("reducer", reducer, Case(time=9)).graph()
    inputs = random_inputs(graph)
    assert np.array_equal(run(graph, {}, inputs), inputs["x"])


def test_mctf_by_similarity_alone_is_tome():
    """One way, unweighted and by cosine it merges the r most similar pairs of even and odd tokens."""
    mctf = Mctf.create({"merged": 4, "bidirectional": False, "info_temperature": 0.0, "weighted": False})
    graph = Subject("mctf", mctf, Case(time=13, batch=1)).graph()
    inputs = random_inputs(graph)
    x = inputs["x"][0]
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    scores = unit[::2] @ unit[1::2].T
    scores[0] = -np.inf
    order = np.argsort(-scores.max(axis=1))
    sums, counts = x[1::2].copy(), np.ones(6)
    for source in order[:4]:
        home = scores[source].argmax()
        sums[home] += x[2 * source]
        counts[home] += 1
    expected = np.concatenate([x[::2][np.sort(order[4:])], sums / counts[:, None]])
    assert relative_error(run(graph, {}, inputs)[0], expected) <= 1e-9
