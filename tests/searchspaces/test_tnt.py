"""The two streams of transformer in transformer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ir.errors import InputError
from ir.graph import Graph
from ir.interpret import evaluate
from nas.checks.subjects import random_params
from searchspaces.space import Space


def tnt(**macro: Any) -> Graph:
    """Two layers over 4 patches of 4 words each."""
    options = {"patch_size": 4, "words_dim": 6, "words_heads": 2, **macro}
    space = Space.from_dict(
        {
            "schema": 1,
            "name": "two_streams",
            "description": "Transformer in transformer.",
            "model": {
                "signature": {"modality": "image", "output": "class", "image_size": 8, "channels": 1, "num_classes": 3},
                "macro": {"tnt": options},
                "d_model": 8,
                "depth": 2,
                "position": "learned",
                "norm": "layer_norm",
                "stem": {"conv_stem": {"window": 3, "stride": 2}},
                "head": {"classifier": {"pool": "first"}},
            },
            "block": {
                "wiring": "pre_norm",
                "token_mixer": {"softmax_attention": {"num_heads": 2, "bias": True}},
                "channel_mixer": {"mlp": {"bias": True}},
            },
        }
    )
    assert space.signature is not None
    return space.smallest().graph(space.signature, batch=2)


def logits(graph: Graph, params: dict[str, np.ndarray]) -> np.ndarray:
    """Scores of two random images."""
    image = np.random.default_rng(1).standard_normal((2, 8, 8, 1))
    return evaluate(graph, {"image": image}, params)["logits"]


def test_words_change_nothing_but_by_merging():
    """With their way into the patches shut, the layers over words are as if they were not there."""
    graph = tnt()
    params = random_params(graph)
    other = {name: array + 1.0 if ".words." in name else array for name, array in params.items()}
    assert np.abs(logits(graph, params) - logits(graph, other)).max() > 1e-6
    shut = {name: np.zeros_like(array) for name, array in params.items() if name.endswith((".merge.norm.scale",))}
    assert len(shut) == 2
    assert np.array_equal(logits(graph, {**params, **shut}), logits(graph, {**other, **shut}))


def test_words_of_one_patch_are_mixed_alone():
    """The words' layers hold the words' width and know nothing of the number of patches."""
    shapes = {name: node.types[0].shape for name, node in tnt().parameters.items()}
    assert shapes["layers.0.words.mixer.q"] == (6, 6)
    assert shapes["layers.0.merge.weight"] == (24, 8)
    assert shapes["stem.word_position"] == (4, 6)
    assert shapes["position.table"] == (5, 8)


def test_another_mixer_for_words():
    """The words' mixer is a choice."""
    graph = tnt(words_mixer="pooling")
    assert "layers.0.words.mixer.q" not in graph.parameters
    assert np.isfinite(logits(graph, random_params(graph))).all()


@pytest.mark.parametrize(
    ("macro", "message"),
    [
        ({"patch_size": 3}, "patches do not fill the image"),
        ({"words_heads": 4}, "cannot mix words"),
        ({"words_mixer": "mamba"}, "cannot mix words"),
    ],
)
def test_what_does_not_fit_is_said(macro: dict[str, Any], message: str):
    """Patches that do not fill the image, and mixers that words cannot have, are errors of the space."""
    with pytest.raises(InputError, match=message):
        tnt(**macro)
