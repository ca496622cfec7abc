"""Long skips between the halves of a stack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codegen import targets
from codegen.compile import compile_graph
from codegen.reference import TOLERANCE
from ir.cost import profile
from ir.errors import InputError
from ir.graph import Graph
from ir.interpret import evaluate
from nas.checks.component import graph_round_trips
from nas.checks.subjects import random_params
from searchspaces.space import Space

Array = np.ndarray
IMAGE = {"modality": "image", "output": "class", "image_size": 4, "channels": 2, "num_classes": 3}
TEXT = {"modality": "tokens", "output": "next_token", "seq_len": 6, "vocab_size": 11}
ATTENTION = {"softmax_attention": {"num_heads": 2}}


def graph_of(macro: str = "u_skips", depth: int = 5, mode: Any = "forward", **settings: Any) -> Graph:
    """A model of width 8, of images unless told."""
    model = {"signature": settings.pop("signature", IMAGE), "d_model": 8, "depth": depth, "macro": macro}
    model["causal"] = model["signature"] is TEXT
    block = {"token_mixer": ATTENTION, "channel_mixer": "mlp"} | settings
    space = Space.from_dict({"schema": 1, "name": "skips", "model": model, "block": block})
    assert space.signature is not None
    return space.smallest().graph(space.signature, batch=2, mode=mode)


def logits(graph: Graph, params: dict[str, Array]) -> Array:
    """Scores of two random images."""
    return evaluate(graph, {"image": np.random.default_rng(1).standard_normal((2, 4, 4, 2))}, params)["logits"]


@pytest.mark.parametrize(("depth", "joined"), [(3, [2]), (4, [3]), (5, [3, 4]), (6, [4, 5])])
def test_layers_of_the_second_half_are_joined(depth: int, joined: list[int]):
    """One or two layers in the middle have no skip, and each other one of the second half has a matrix."""
    graph, plain = graph_of(depth=depth), graph_of("staged", depth=depth)
    assert [name for name in graph.parameters if name.endswith(".weight") and name.startswith("skips")] == [
        f"skips.{number}.weight" for number in joined
    ]
    assert profile(graph).params - profile(plain).params == len(joined) * (2 * 8 + 1) * 8


@pytest.mark.parametrize("mixer", [ATTENTION, "depthwise_conv2d"])
def test_skips_of_weight_zero_leave_the_plain_stack(mixer: Any):
    """With the identity for the stream and 0 for the skip the model is the plain stack."""
    graph, plain = graph_of(token_mixer=mixer), graph_of("staged", token_mixer=mixer)
    params = random_params(graph)
    shut = dict(params)
    for number in (3, 4):
        shut[f"skips.{number}.weight"] = np.concatenate([np.eye(8), np.zeros((8, 8))])
        shut[f"skips.{number}.bias"] = np.zeros(8)
    expected = logits(plain, {name: params[name] for name in plain.parameters})
    np.testing.assert_allclose(logits(graph, shut), expected, rtol=0, atol=1e-12)
    assert np.abs(logits(graph, params) - expected).max() > 1e-3


def test_a_skip_comes_from_the_mirror_image():
    """With a stream of weight zero, layer 4 of five reads layer 0 alone: those between change nothing."""
    graph = graph_of()
    params = random_params(graph)
    params["skips.4.weight"] = np.concatenate([np.zeros((8, 8)), np.eye(8)])
    before = logits(graph, params)
    for number, matters in ((0, True), (1, False), (2, False), (3, False), (4, True)):
        name = f"layers.{number}.channel_mixer.down"
        changed = logits(graph, {**params, name: params[name] + 0.1})
        assert bool(np.abs(changed - before).max() > 1e-9) is matters, number


def test_a_decoder_with_skips_streams():
    """Skips join a token with itself, so the step graph gives what the whole sequence does."""
    whole, stream = graph_of(signature=TEXT), graph_of(signature=TEXT, mode="step")
    params, tokens = random_params(whole), np.random.default_rng(2).integers(0, 11, (2, 6)).astype(np.int32)
    expected = evaluate(whole, {"tokens": tokens}, params)["logits"]
    state = {name: np.zeros(node.types[0].shape) for name, node in stream.inputs.items() if name.startswith("state")}
    for t in range(6):
        given = {"tokens": tokens[:, t : t + 1], "position": np.array(t, np.int32), **state}
        state = evaluate(stream, given, params)
        np.testing.assert_allclose(state.pop("logits")[:, 0], expected[:, t], rtol=0, atol=1e-12)


def test_skips_compile():
    """Text and JSON give the graph back, and the kernels give what torch gives."""
    graph = graph_of()
    graph_round_trips(graph)
    params = {name: array.astype(np.float32) for name, array in random_params(graph).items()}
    error = compile_graph(graph, params, targets.get("cpu")).verification_error
    assert error is not None
    assert error <= TOLERANCE


@pytest.mark.parametrize("settings", [{"depth": 2}, {"reducer": {"token_slimming": {}}}])
def test_what_has_no_mirror_image_is_refused(settings: dict[str, Any]):
    """Two layers have no middle, and fewer tokens cannot stand beside more."""
    with pytest.raises(InputError, match="the macro u_skips cannot build this model"):
        graph_of(**settings)
