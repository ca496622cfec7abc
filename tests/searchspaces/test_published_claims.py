"""What papers claim of wirings, of channel mixers at their start, and of whole models; limits are in the components."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ir.builder import Builder
from ir.component import ChannelMixer, TokenMixer
from ir.cost import profile
from ir.graph import Graph
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.ops.attention import Attention
from ir.ops.structure import Parameter
from nas.checks.component import relative_error
from nas.checks.subjects import Subject, random_inputs, random_params, run
from searchspaces import reference, registry
from searchspaces.space import Space


def language_space(**block: Any) -> Space:
    """Decoders of 11 tokens, 12 wide and 3 layers deep."""
    signature = {"modality": "tokens", "output": "next_token", "seq_len": 16, "vocab_size": 11}
    model = {"signature": signature, "d_model": 12, "depth": 3, "causal": True, "norm": "rms_norm"}
    attention = {"softmax_attention": {"num_heads": 2}}
    return Space.from_dict(
        {"schema": 1, "name": "s", "model": model, "block": {"token_mixer": attention, "channel_mixer": "mlp", **block}}
    )


def graph_of(space: Space) -> Graph:
    """The graph of the smallest architecture."""
    assert space.signature is not None
    return space.smallest().graph(space.signature)


def logits(graph: Graph, params: dict[str, np.ndarray]) -> np.ndarray:
    """The logits of one sequence."""
    return evaluate(graph, {"tokens": np.arange(16, dtype=np.int32)[None] % 11}, params)["logits"]


def test_layernorm_scaling_is_a_scale_of_each_norm():
    """Dividing the norms of layer l by sqrt(l) is a model whose norms have a smaller scale there, at no cost."""
    plain, scaled = (
        graph_of(language_space(wiring=wiring)) for wiring in ("pre_norm", {"pre_norm": {"norm_by_depth": True}})
    )
    params = random_params(plain)
    folded = {
        name: array / (int(name.split(".")[1]) + 1) ** 0.5 if "norm_" in name else array
        for name, array in params.items()
    }
    assert any(not np.array_equal(folded[name], params[name]) for name in params)
    assert profile(scaled).params == profile(plain).params
    assert relative_error(logits(scaled, params), logits(plain, folded)) <= 1e-6


@pytest.mark.parametrize("gate", ["gru", "output", "highway", "sigmoid_tanh"])
def test_gated_residual_that_is_shut_is_the_identity(gate: str):
    """With a large bias nothing of a branch joins the stream."""
    block = registry.get("block", "gated_residual").create({"gate": gate, "gate_bias": 60.0})
    subject = Subject(gate, block, block.cases[0])
    graph = subject.graph()
    params = {name: array if name.endswith("_b") else 0.1 * array for name, array in random_params(graph).items()}
    inputs = random_inputs(graph)
    assert relative_error(run(graph, params, inputs), inputs["x"]) <= 1e-12


def test_masformer_pays_for_spans_only():
    """Full attention in one of three layers costs a third of it and the windows; local layers keep a bounded state."""
    local = {"softmax_attention": {"num_heads": 2, "window": 4}}
    full = {"softmax_attention": {"num_heads": 2}}
    mixed = language_space(token_mixer={"pattern": [full, local, local]})
    found, whole = (_attention_flops(graph_of(space)) for space in (mixed, language_space(token_mixer=full)))
    pairs, seen = 16 * 17 // 2, 1 + 2 + 3 + 4 * 13
    assert found / whole == pytest.approx((pairs + 2 * seen) / (3 * pairs))
    assert mixed.signature is not None
    step = mixed.smallest().graph(mixed.signature, mode="step", max_len=100)
    slots = [node.types[0].shape[1] for name, node in step.inputs.items() if name.endswith("mixer.k")]
    assert slots == [100, 3, 3]


def _attention_flops(graph: Graph) -> int:
    nodes = [node for node in graph.nodes if isinstance(node.op, Attention)]
    return sum(node.op.flops(graph.operand_types(node), node.types) for node in nodes)


def test_wide_attention_is_half_the_size():
    """One layer of 48 heads has less than half the matrices of six layers of 8, head sizes and all."""

    def size(depth: int, heads: int) -> int:
        signature = {"modality": "tokens", "output": "class", "seq_len": 8, "vocab_size": 11, "num_classes": 2}
        block = {"token_mixer": {"softmax_attention": {"num_heads": heads, "head_dim": 8}}, "channel_mixer": "mlp"}
        model = {"signature": signature, "d_model": 64, "depth": depth, "causal": False}
        graph = graph_of(Space.from_dict({"schema": 1, "name": "w", "model": model, "block": block}))
        return sum(node.types[0].size for name, node in graph.parameters.items() if name.startswith("layers."))

    assert 0.4 < size(1, 48) / size(6, 8) < 0.5


def test_primer_convolutions_begin_at_the_token_itself():
    """Half of the newest token and half of a third of each of three: as published, and no parameter is drawn."""
    mixer = registry.get("token_mixer", "softmax_attention").create({"num_heads": 2, "conv_size": 3})
    b = Builder()
    assert isinstance(mixer, TokenMixer)
    params = initialize(b.build(y=mixer.build(b, b.input("x", (1, 5, 12)))), 0)
    assert np.allclose(params["q_conv"][:, 0, 0], [0.5 / 3, 0.5 / 3, 0.5])


def test_rational_layers_begin_as_identity_and_silu():
    """Between -3 and 3 the second function is SiLU to a hundredth, and the output varies as much as the input."""
    mixer = registry.get("channel_mixer", "rational_kan").create({"expansion": 4.0})
    assert isinstance(mixer, ChannelMixer)
    b = Builder()
    graph = b.build(y=mixer.build(b, b.input("x", (64, 64))))
    params = {name: array.astype(np.float64) for name, array in initialize(graph, 0).items()}
    x = np.random.default_rng(0).standard_normal((64, 64))
    assert np.var(evaluate(graph, {"x": x}, params)["y"]) == pytest.approx(1.0, abs=0.1)
    hidden = x @ params["up"] + params["up_bias"]
    expected = reference.silu(hidden) @ params["down"]
    assert relative_error(evaluate(graph, {"x": x}, params)["y"], expected) <= 0.02


def test_smoe_dropout_leaves_its_router_alone():
    """The router is not trained, and one set of weights serves any number of experts in use."""
    shapes = []
    for top_k in (1, 2, 4):
        entry = registry.default_registry().lookup("channel_mixer", "smoe_dropout")
        mixer = entry.component.create({**entry.preset, "num_experts": 4, "top_k": top_k})
        assert isinstance(mixer, ChannelMixer)
        b = Builder()
        graph = b.build(y=mixer.build(b, b.input("x", (3, 12))))
        fixed = {name for name, node in graph.parameters.items() if not _trained(node.op)}
        assert fixed == {"router", "router_bias"}
        shapes.append({name: node.types[0].shape for name, node in graph.parameters.items()})
    assert shapes[0] == shapes[1] == shapes[2]


def _trained(op: object) -> bool:
    assert isinstance(op, Parameter)
    return op.trained
