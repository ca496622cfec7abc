"""Attention whose weights are no softmax, in torch and compiled."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codegen import lower, targets
from codegen.torch_backend import to_module
from ir.builder import Builder
from ir.graph import Graph
from ir.interpret import evaluate
from tests.codegen.building import run_graph

OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {"normaliser": "sigmoid"},
    "sigmoid_shifted": {"normaliser": "sigmoid", "shift": 0.3},
    "clipped": {"normaliser": "clipped_softmax", "stretch": (-0.05, 1.02)},
}


def graphs(options: dict[str, Any]) -> list[Graph]:
    """Attention with and without a mask, an offset and a bias; some queries see no key."""
    made = []
    for masked, offset, bias in itertools.product((False, True), repeat=3):
        b = Builder()
        q, k, v = b.input("q", (2, 5, 4, 3)), b.input("k", (2, 4, 2, 3)), b.input("v", (2, 4, 2, 6))
        extra = {"offset": b.input("offset", (), "int32")} if offset else {}
        extra |= {"bias": b.input("bias", (4, 5, 4))} if bias else {}
        made.append(b.build(y=b.attention(q, k, v, causal=masked, window=3 if masked else None, **extra, **options)))
    return made


@pytest.mark.parametrize("case", OPTIONS)
def test_weights_equal_numpy_and_have_gradients(case: str) -> None:
    """Values equal the operation's meaning, and no gradient is lost in what is hidden."""
    rng = np.random.default_rng(0)
    for graph in graphs(OPTIONS[case]):
        inputs = {
            name: rng.standard_normal(node.types[0].shape) if node.types[0].is_float else np.array(1, np.int32)
            for name, node in graph.inputs.items()
        }
        tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
        leaves = [tensor.requires_grad_() for tensor in tensors.values() if tensor.is_floating_point()]
        y = to_module(graph, dtype=torch.float64)(**tensors)["y"]
        np.testing.assert_allclose(y.detach().numpy(), evaluate(graph, inputs, {})["y"], atol=1e-12)
        y.square().sum().backward()
        assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("case", OPTIONS)
def test_compiled_graph_equals_the_operation(case: str, tmp_path: Path) -> None:
    """The compiler hands every option on to the kernel; a constant bias arrives packed."""
    rng = np.random.default_rng(0)
    b = Builder()
    q, kv = b.input("q", (2, 19, 4, 8)), b.input("kv", (2, 21, 2, 8))
    bias = b.constant(rng.standard_normal((4, 19, 21)).astype(np.float32))
    graph = b.build(y=b.attention(q, kv, kv, causal=True, bias=bias, **OPTIONS[case]))
    inputs = {name: rng.standard_normal(node.types[0].shape).astype(np.float32) for name, node in graph.inputs.items()}
    target = targets.get("cpu:avx2", threads=1)
    (call,) = lower.lower(graph, target).calls
    assert call.kernel.packs(3)
    _, outputs = run_graph(graph, {}, target, tmp_path, inputs)
    np.testing.assert_allclose(outputs["y"], evaluate(graph, inputs, {})["y"], rtol=0, atol=1e-5)
