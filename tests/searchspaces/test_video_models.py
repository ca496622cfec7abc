"""Models of video: which tokens see each other along the axes, and what they have in common with models of images."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from ir.cost import profile
from ir.errors import InputError
from ir.graph import Graph
from ir.interpret import evaluate
from nas.checks.subjects import random_params
from searchspaces.signature import Signature
from searchspaces.space import Space

VIDEO = Signature(modality="video", output="forecast", seq_len=3, image_size=8, channels=1, horizon=3)
ATTENTION = {"softmax_attention": {"num_heads": 2}}
PUBLISHED = ("F", "SSTT", "TTSS", "ST", "TS", "TST", "STS", "TSST", "STTS")
Array = np.ndarray


def graph_of(
    axes: str | None, signature: Signature = VIDEO, mixer: dict[str, Any] = ATTENTION, depth: int = 4, **model: Any
) -> Graph:
    """A model of four layers; the plain stack without axes."""
    sizes = {name: size for name, size in dataclasses.asdict(signature).items() if size}
    macro = {"axial": {"axes": axes}} if axes is not None else "staged"
    settings = {"signature": sizes, "d_model": 8, "depth": depth, "norm": "layer_norm", "macro": macro} | model
    block = {"token_mixer": mixer, "channel_mixer": "swiglu"}
    space = Space.from_dict({"schema": 1, "name": "video", "model": settings, "block": block})
    return space.smallest().graph(signature)


def a_video(signature: Signature = VIDEO) -> Array:
    """One video of noise."""
    return np.random.default_rng(0).standard_normal(signature.input_shape(1))


def forecast(graph: Graph, params: dict[str, Array], video: Array) -> Array:
    """What the graph makes of a video."""
    return evaluate(graph, {"video": video}, params)["forecast"]


def changed(axes: str) -> Array:
    """Which patches `[T, N]` of the output a patch of the input, frame 1, row 0, column 1, has an influence on."""
    graph, video = graph_of(axes), a_video()
    params, other = random_params(graph), video.copy()
    other[:, 1, :4, 4:] += 1.0
    difference = np.abs(forecast(graph, params, other) - forecast(graph, params, video))[0, ..., 0]
    return difference.reshape(3, 2, 4, 2, 4).max(axis=(2, 4)).reshape(3, 4) > 1e-9


def test_shapes_of_a_video_signature():
    """Frames in, frames out."""
    signature = dataclasses.replace(VIDEO, horizon=5, channels=2)
    assert signature.input_shape(7) == (7, 3, 8, 8, 2)
    assert signature.output_shape(7) == (7, 5, 8, 8, 2)
    assert (signature.input_name, signature.output_name, signature.input_dtype) == ("video", "forecast", "float32")
    assert signature.positions == 3 * 64
    with pytest.raises(InputError, match="bad image_size"):
        dataclasses.replace(VIDEO, image_size=0)


def test_frames_do_not_see_each_other_along_space():
    """With S alone one frame changes itself, all of it."""
    expected = np.zeros((3, 4), dtype=bool)
    expected[1] = True
    assert np.array_equal(changed("S"), expected)


def test_patches_do_not_see_each_other_along_time():
    """With T alone one patch changes itself, in all frames."""
    expected = np.zeros((3, 4), dtype=bool)
    expected[:, 1] = True
    assert np.array_equal(changed("T"), expected)


@pytest.mark.parametrize("axes", PUBLISHED)
def test_published_variants_see_everything_with_the_same_parameters(axes: str):
    """All nine variants have the parameters of the plain stack, and every token reaches every other one."""
    assert changed(axes).all()
    assert profile(graph_of(axes)).params == profile(graph_of(None)).params


def test_full_axis_is_the_plain_stack():
    """F is the stack of layers over all tokens, to the bit."""
    full, plain = graph_of("F"), graph_of(None)
    params = random_params(plain)
    assert np.array_equal(forecast(full, params, a_video()), forecast(plain, params, a_video()))


@pytest.mark.parametrize("axes", ["F", "S"])
def test_one_frame_is_an_image(axes: str):
    """On one frame the layers are those of the vision model: the mean of the forecast's tokens is its classes."""
    signature = dataclasses.replace(VIDEO, seq_len=1, horizon=1)
    image = Signature(modality="image", output="class", image_size=8, channels=1, num_classes=16)
    video_graph = graph_of(axes, signature)
    image_graph = graph_of(None, image, stem={"image_patches": {"patch_size": 4}})
    params, frame = random_params(video_graph), a_video(signature)
    as_classes = {("head.weight_bias" if name == "head.bias" else name): array for name, array in params.items()}
    assert set(as_classes) == set(random_params(image_graph))
    pixels = forecast(video_graph, params, frame).reshape(2, 4, 2, 4).transpose(0, 2, 1, 3).reshape(4, 16)
    classes = evaluate(image_graph, {"image": frame[:, 0]}, as_classes)["logits"][0]
    np.testing.assert_allclose(pixels.mean(axis=0), classes, atol=1e-12)


def test_frames_in_another_order_come_out_in_that_order():
    """Without positions and with attention nothing tells frames apart."""
    graph, video, order = graph_of("TSST"), a_video(), [2, 0, 1]
    params = random_params(graph)
    found = forecast(graph, params, video[:, order])
    np.testing.assert_allclose(found, forecast(graph, params, video)[:, order], atol=1e-12)


def test_mixers_on_the_plane_mix_within_frames():
    """A mixer that needs a grid finds that of a frame along space, and none along time."""
    mixer = {"depthwise_conv2d": {"kernel_size": 3}}
    assert graph_of("S", mixer=mixer)
    with pytest.raises(InputError, match="grid of an image"):
        graph_of("T", mixer=mixer)


def test_another_horizon_mixes_the_frames():
    """5 frames from 3."""
    signature = dataclasses.replace(VIDEO, horizon=5)
    graph = graph_of("TS", signature)
    params = random_params(graph)
    assert params["head.times"].shape == (3, 5)
    assert forecast(graph, params, a_video()).shape == (1, 5, 8, 8, 1)


@pytest.mark.parametrize("axes", ["", "TX", "ts"])
def test_axes_are_letters(axes: str):
    """The message says which letters there are."""
    with pytest.raises(InputError, match="bad axes"):
        graph_of(axes)


def test_axes_need_a_video():
    """An image has no time, and a forecast of a video no other head."""
    image = Signature(modality="image", output="class", image_size=8, channels=1, num_classes=3)
    with pytest.raises(InputError, match="the macro axial cannot build this model"):
        graph_of("TS", image)
    with pytest.raises(InputError, match="the head does not fit the task"):
        graph_of("TS", head="forecaster")
