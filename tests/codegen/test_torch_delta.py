"""The delta rule in torch, by chunks and by steps, and compiled: against its numpy meaning and finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch

from codegen.torch_backend import to_module
from ir.builder import Builder
from ir.graph import Graph
from ir.ops.recurrence import FORMS, Decay, Form
from tests.codegen.test_lower import run
from tests.codegen.test_torch_backend import check, check_gradient, draw

DECAYS: tuple[Decay, ...] = ("none", "head", "key")


def delta_rule(decay: Decay, steps: int, *, form: Form = "auto", state: bool = False, chunk: int = 16) -> Graph:
    """The delta rule with all its outputs; decays are below one, keys short, betas in (0, 1)."""
    b = Builder()
    batch, heads, keys, values = 2, 3, 4, 5
    q, k = b.input("q", (batch, steps, heads, keys)), b.input("k", (batch, steps, heads, keys))
    v = b.input("v", (batch, steps, heads, values))
    shapes = {"none": (), "head": (q.shape[:3],), "key": (q.shape,)}[decay]
    gates = [-b.softplus(b.input("gate", shape)) for shape in shapes]
    initial = b.input("state", (batch, heads, keys, values)) if state else None
    beta = b.sigmoid(b.input("beta", q.shape[:3]))
    y, last = b.outer_scan(
        q, b.rms_norm(k) * 0.5, v, *gates, decay=decay, scale=0.5, beta=beta, state=initial, form=form, chunk=chunk
    )
    return b.build(y=y, last=last)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
def test_delta_rule_equals_numpy(decay: Decay, form: Form) -> None:
    """One step, less than a chunk, whole chunks and chunks with a rest, with and without an initial state."""
    for steps, chunk, state in itertools.product((1, 7, 32, 37), (1, 16), (False, True)):
        check(delta_rule(decay, steps, form=form, state=state, chunk=chunk))


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@pytest.mark.parametrize("decay", DECAYS)
def test_delta_rule_is_differentiable(decay: Decay, form: Form) -> None:
    """Gradients of every operand match finite differences over a short chunk and a rest."""
    check_gradient(delta_rule(decay, 5, form=form, state=True, chunk=2))


def test_delta_rule_survives_strong_decay() -> None:
    """Decays that vanish in float32 within a chunk give neither infinities nor NaN, forward or backward."""
    decays: tuple[Decay, ...] = ("head", "key")
    for decay, form in itertools.product(decays, FORMS):
        graph = delta_rule(decay, 37, form=form)
        inputs = {name: torch.from_numpy(array).float() for name, array in draw(graph).items()}
        inputs["gate"] += 100.0
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        outputs = to_module(graph)(**inputs)
        torch.stack([output.sum() for output in outputs.values()]).sum().backward()
        assert all(torch.isfinite(output).all() for output in outputs.values())
        assert all(tensor.grad is not None and torch.isfinite(tensor.grad).all() for tensor in inputs.values())


@pytest.mark.parametrize("decay", DECAYS)
def test_delta_rule_runs_compiled(decay: Decay, tmp_path) -> None:
    """A whole sequence and one streaming step, kernels and their neighbours together."""
    run(delta_rule(decay, 7), tmp_path)
    run(delta_rule(decay, 1, state=True), tmp_path)
