"""Pyramids, patterns, reducers and transitions: what a space may say of them, and what graphs come out."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from ir.builder import Builder
from ir.cost import profile
from ir.errors import InputError, SpaceError
from ir.graph import Graph
from ir.interpret import evaluate
from nas.checks.subjects import random_params
from searchspaces import registry
from searchspaces.architecture import Architecture
from searchspaces.signature import Signature
from searchspaces.space import Space

IMAGE = Signature(modality="image", output="class", image_size=8, channels=3, num_classes=5)


def pyramid(**changes: Any) -> dict[str, Any]:
    """A space of two stages on images of 8 pixels."""
    return {
        "schema": 1,
        "name": "p",
        "model": {
            "signature": {"modality": "image", "output": "class", "image_size": 8, "channels": 3, "num_classes": 5},
            "stem": {"image_patches": {"patch_size": 1}},
            "norm": "layer_norm",
        },
        "block": {"token_mixer": "depthwise_conv2d", "channel_mixer": {"mlp": {"expansion": 2.0}}},
        "stages": [
            {"d_model": 8, "depth": {"range": [1, 2, 1]}},
            {
                "transition": {"conv_downsample": {"norm": {"choice": ["none", "layer_norm"]}}},
                "d_model": {"choice": [12, 16]},
                "depth": 2,
                "block": {"token_mixer": {"per_layer": True, "choice": ["depthwise_conv2d", "softmax_attention"]}},
            },
        ],
        **changes,
    }


def graph_of(space: Space, architecture: Architecture | None = None) -> Graph:
    """The graph of an architecture, or of the smallest."""
    return (architecture or space.smallest()).graph(IMAGE, batch=2)


def test_pyramid_counts_what_it_enumerates():
    """2 depths, 2 norms, 2 widths, and 2 mixers in each of two layers; every one builds and is found again."""
    space = Space.from_dict(pyramid())
    every = list(space.enumerate())
    assert len(every) == len(set(every)) == space.size() == 2 * 2 * 2 * 4
    for architecture in every:
        assert space.is_valid(architecture) is None
        assert space.architecture(json.loads(json.dumps(architecture.to_dict()))) == architecture
        graph = graph_of(space, architecture)
        assert graph.type_of(graph.outputs[0][1]).shape == (2, 5)


def test_pyramid_halves_its_grid_and_changes_its_width():
    """The first stage mixes 64 tokens of 8 channels, the second 16 of 16."""
    graph = graph_of(Space.from_dict(pyramid()), Space.from_dict(pyramid()).largest())
    kernels = {name: node.types[0].shape for name, node in graph.parameters.items() if name.endswith("mixer.kernel")}
    assert kernels["layers.0.mixer.kernel"] == (3, 3, 1, 8)
    assert graph.parameters["transitions.1.kernel"].types[0].shape == (2, 2, 8, 16)
    assert graph.parameters["layers.3.mixer.q"].types[0].shape == (16, 16)


def test_mutation_and_crossover_stay_in_a_pyramid():
    """Each changes something now and then, and never leaves the space."""
    space, rng = Space.from_dict(pyramid()), np.random.default_rng(0)
    parents = [space.sample(rng) for _ in range(6)]
    children = [space.mutate(parent, rng) for parent in parents]
    children += [space.crossover(a, b, rng) for a, b in itertools.pairwise(parents)]
    assert all(space.is_valid(child) is None for child in children)
    assert all(child != parent for child, parent in zip(children, parents, strict=False))


def test_pattern_gives_layers_their_turns():
    """`a x 2, b` makes a a b a a for five layers; the options of a turn are drawn once."""
    mixer = {"pattern": ["retention x 2", {"softmax_attention": {"num_heads": {"choice": [1, 2]}}}]}
    space = Space.from_dict(
        {
            "schema": 1,
            "name": "turns",
            "model": {"task": "char_lm", "d_model": 8, "depth": 5},
            "block": {"token_mixer": mixer, "channel_mixer": "none"},
        }
    )
    keys = [layer.token_mixer.key for layer in space.smallest().model.layers]
    assert keys == ["retention", "retention", "softmax_attention", "retention", "retention"]
    assert space.size() == 2
    assert {layer.token_mixer.values.get("num_heads") for layer in space.largest().model.layers[2:3]} == {2}
    assert space.is_valid(space.largest()) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "the list is empty"),
        (
            {"stages": [{"d_model": 8, "depth": 1, "transition": "conv_downsample"}]},
            "the stem leads to the first stage",
        ),
        ({"stages": [{"d_model": 8, "depth": 1}, {"d_model": 8, "depth": 1}]}, "the stem leads to the first stage"),
        ({"block": {"channel_mixer": "none"}}, "the stage has no `token_mixer`"),
        ({"block": {"token_mixer": {"pattern": ["pooling"], "per_layer": True}, "channel_mixer": "none"}}, "a pattern"),
        ({"block": {"token_mixer": {"pattern": []}, "channel_mixer": "none"}}, "the list is empty"),
        ({"block": {"token_mixer": {"pattern": ["poolng x 2"]}, "channel_mixer": "none"}}, "unknown token mixer"),
        ({"block": {"token_mixer": {"per_layer": True}, "channel_mixer": "none"}}, "a place in the block takes"),
    ],
)
def test_malformed_pyramid_is_refused(change: dict[str, Any], message: str):
    """Each mistake has its own message, with what to do."""
    with pytest.raises(SpaceError, match=message) as caught:
        Space.from_dict(pyramid(**change))
    assert caught.value.hint


def test_signature_and_task_exclude_each_other():
    """A space trains on a task's data or has a signature alone."""
    data = pyramid()
    data["model"] = {**data["model"], "task": "digits"}
    with pytest.raises(SpaceError, match="task and signature together"):
        Space.from_dict(data)
    data = pyramid()
    data["model"]["signature"] = {"modality": "image", "output": "forecast"}
    with pytest.raises(SpaceError):
        Space.from_dict(data)


def test_spatial_mixer_needs_a_grid():
    """A class token has no place on the plane; the error says which part asks for one."""
    data = pyramid()
    data["model"]["stem"] = {"image_patches": {"patch_size": 1, "class_token": True}}
    with pytest.raises(InputError, match="grid of an image") as caught:
        graph_of(Space.from_dict(data))
    assert "layers.0.mixer" in (caught.value.where or "")


def test_reducer_needs_a_wiring_with_a_place_for_it():
    """post_norm has none."""
    from searchspaces.registry import components

    others = [key for key in components("reducer") if key != "none"]
    data = pyramid(stages=[{"d_model": 8, "depth": 1}])
    data["block"] = {**data["block"], "wiring": "post_norm", "reducer": others[0], "token_mixer": "softmax_attention"}
    with pytest.raises(InputError, match="no place for a reducer"):
        graph_of(Space.from_dict(data))


def test_untrained_parameters_are_not_counted():
    """Running statistics of batch norm are weights of the model, but nobody trains them."""
    plain = graph_of(Space.from_dict(pyramid(stages=[{"d_model": 8, "depth": 1}])))
    block = {"token_mixer": {"depthwise_conv2d": {"batch_norm": True}}}
    normed = graph_of(Space.from_dict(pyramid(stages=[{"d_model": 8, "depth": 1, "block": block}])))
    assert profile(normed).params == profile(plain).params + 8
    assert profile(normed).param_bytes == profile(plain).param_bytes + 4 * 24


def test_attention_with_weights_is_attention():
    """What a reducer makes attention compute for its weights gives the same output, and rows that sum to 1."""
    mixer: Any = registry.get("token_mixer", "softmax_attention").create(
        {"num_heads": 2, "causal": False, "bias": True}
    )
    outputs: dict[str, np.ndarray] = {}
    for name in ("plain", "weights"):
        b = Builder()
        x = b.input("x", (2, 5, 6))
        y, weights = (mixer.build(b, x), x) if name == "plain" else mixer.build_with_weights(b, x)
        graph = b.build(y=y, weights=weights)
        params = random_params(graph)
        found = evaluate(graph, {"x": np.random.default_rng(0).standard_normal((2, 5, 6))}, params)
        outputs[name] = found["y"]
        if name == "weights":
            assert found["weights"].shape == (2, 2, 5, 5)
            assert np.abs(found["weights"].sum(axis=-1) - 1).max() < 1e-12
    assert np.abs(outputs["plain"] - outputs["weights"]).max() < 1e-7  # the scale of the scores is a float32 constant
