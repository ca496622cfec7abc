"""Models of timm beside those of the zoo: random weights copied across, outputs compared.

timm and transformers import torchvision, whose build on PyPI looks for CUDA; without it two operators are missing that
no model here calls, so empty ones stand in for them.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from codegen.torch_backend import to_module
from ir.graph import Graph
from ir.op import Array
from searchspaces.space import Space, shipped_spaces
from searchspaces.yaml_source import read_yaml

TOLERANCE = 1e-4
MISSING_OPERATORS = ("nms", "qnms")

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A regular expression for the start of a name in timm, and what becomes of it."""
Weights = dict[str, Array]

BATCH_NORM: tuple[Rule, ...] = (
    (r"_norm\.weight$", "_norm_scale"),
    (r"_norm\.bias$", "_norm_bias"),
    (r"_norm\.running_mean$", "_norm_mean"),
    (r"_norm\.running_var$", "_norm_variance"),
)
"""Names of a batch norm's factors, once its own name ends with `_norm`."""


@functools.cache
def _stubs() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in MISSING_OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


def public_library(name: str) -> Any:
    """A library that imports torchvision; skips the test where either is absent."""
    for needed in ("torchvision", name):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed; `make crosscheck` installs it")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        _stubs()
    return importlib.import_module(name)


def timm_model(name: str, **options: Any) -> torch.nn.Module:
    """A model of timm in float64 with random weights and statistics; skips the test where timm is absent."""
    timm = public_library("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, **options).double().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.ndim < 2:
                tensor.add_(0.2 * torch.randn_like(tensor))
    return model


def first_layers(space: Space) -> list[int]:
    """The number of the first layer of each stage of the one model of a space."""
    depths = [len(stage.layers) for stage in space.smallest().model.stages]
    return [sum(depths[:index]) for index in range(len(depths))]


def weights_of(model: torch.nn.Module) -> Weights:
    """Weights and statistics by their names in timm."""
    found = {name: tensor.numpy() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    return {name: array for name, array in found.items() if array.size}


def divided(weights: Weights, joint: str, parts: Callable[[int], dict[str, int]]) -> Weights:
    """The weights with those whose names hold `joint` cut into parts of so many outputs, named in its place.

    `parts` gives them for a number of outputs.
    """
    result: Weights = {}
    for name, array in weights.items():
        if joint not in name:
            result[name] = array
            continue
        sizes = parts(array.shape[0])
        ends = np.cumsum(list(sizes.values()))
        for part, piece in zip(sizes, np.split(array, ends[:-1]), strict=True):
            result[name.replace(joint, part)] = piece
    return result


def renamed(weights: Weights, rules: Sequence[Rule]) -> Weights:
    """The weights under the names that all rules, one after the other, make of theirs."""
    result: Weights = {}
    for name, array in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = array
    return result


def fitted(graph: Graph, weights: Weights) -> Weights:
    """The weights as the parameters of a graph: input channels before output channels, 1x1 kernels as matrices."""
    shapes = {name: node.types[0].shape for name, node in graph.parameters.items()}
    assert set(weights) == set(shapes), (
        f"only in timm {set(weights) - set(shapes)}, only here {set(shapes) - set(weights)}"
    )
    turned = {2: (1, 0), 4: (2, 3, 1, 0)}
    result: Weights = {}
    for name, array in weights.items():
        placed = np.transpose(array, turned.get(array.ndim, range(array.ndim)))
        assert placed.size == np.prod(shapes[name]), f"{name}: {placed.shape} for {shapes[name]}"
        result[name] = np.reshape(placed, shapes[name])
    return result


def variant(zoo: str, **model: Any) -> Space:
    """A zoo's space with some entries of its `model` replaced."""
    data: Any = read_yaml(shipped_spaces()[zoo]).data
    return Space.from_dict({**data, "model": {**data["model"], **model}})


def assert_equal_outputs(space: Space, model: torch.nn.Module, weights: Weights) -> None:
    """The one model of a space gives with these weights what a model of timm gives."""
    assert space.signature is not None
    graph = space.smallest().graph(space.signature, batch=2)
    module = to_module(graph, fitted(graph, weights), dtype=torch.float64).eval()
    size = space.signature.image_size
    image = torch.from_numpy(np.random.default_rng(1).standard_normal((2, size, size, 3)))
    with torch.no_grad():
        expected = model(image.permute(0, 3, 1, 2))
        found = module(image=image)["logits"]
    assert float(expected.abs().max()) > 0
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE
