"""What the papers of forecasting claim of their models: linear ones, inverted ones, and loops of layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from ir.builder import Builder
from ir.cost import profile
from ir.errors import GraphError, InputError
from ir.graph import Graph
from ir.interpret import evaluate
from ir.types import Axis
from nas.checks.subjects import random_params
from searchspaces.architecture import Architecture
from searchspaces.signature import Signature
from searchspaces.space import Space

SERIES = Signature(modality="series", output="forecast", seq_len=16, variates=3, horizon=5)
TOKENS = Signature(modality="tokens", output="next_token", seq_len=8, vocab_size=11)
Array = np.ndarray
ATTENTION = {"token_mixer": {"softmax_attention": {"num_heads": 2}}, "channel_mixer": {"mlp": {"expansion": 2.0}}}


def only_model(signature: Signature, block: dict[str, Any], **model: Any) -> Architecture:
    """The only model of a space."""
    sizes = {name: size for name, size in dataclasses.asdict(signature).items() if size}
    settings = {"signature": sizes, "d_model": 8, "depth": 2, "norm": "layer_norm", "causal": False} | model
    return Space.from_dict({"schema": 1, "name": "one", "model": settings, "block": block}).smallest()


def graph_of(signature: Signature, block: dict[str, Any] = ATTENTION, **model: Any) -> Graph:
    """The graph of the only model of a space."""
    return only_model(signature, block, **model).graph(signature)


def forecast(graph: Graph, params: dict[str, Array], series: Array) -> Array:
    """What the graph makes of one series `[T, C]`."""
    return evaluate(graph, {"series": series[None]}, params)["forecast"][0]


def a_series(signature: Signature = SERIES) -> Array:
    """A random walk of each variate."""
    return np.random.default_rng(0).standard_normal((signature.seq_len, signature.variates)).cumsum(axis=0)


INVERTED: dict[str, Any] = {
    "stem": "series_variates",
    "head": {"forecaster": {"source": "each"}},
    "macro": {"staged": {"normalise": "instance"}},
}


def test_inverted_model_does_not_know_its_variates_apart():
    """Variates in another order come out in that order (Liu et al. 2024)."""
    graph, series, order = graph_of(SERIES, **INVERTED), a_series(), [2, 0, 1]
    params = random_params(graph)
    np.testing.assert_allclose(
        forecast(graph, params, series[:, order]), forecast(graph, params, series)[:, order], atol=1e-12
    )


def test_inverted_model_reads_other_variates_with_the_same_parameters():
    """No parameter depends on the number of variates."""
    few, many = (graph_of(dataclasses.replace(SERIES, variates=count), **INVERTED) for count in (3, 7))
    params = random_params(few)
    assert set(params) == set(random_params(many))
    assert forecast(many, params, np.zeros((16, 7))).shape == (5, 7)


def test_inverted_model_costs_the_look_back_only_in_its_stem():
    """Twice the times add C L D multiply-adds, those of the first matrix."""
    macs = [
        profile(graph_of(dataclasses.replace(SERIES, seq_len=length), **INVERTED, position="none")).macs
        for length in (16, 32)
    ]
    assert macs[1] - macs[0] == 3 * 16 * 8


@pytest.mark.parametrize(("normalise", "factor"), [("last", 1.0), ("instance", 3.0)])
def test_normalised_forecasts_move_with_their_series(normalise: str, factor: float):
    """f(a x + c) = a f(x) + c, for a = 1 where only the last value is taken off (Zeng et al. 2023; Kim et al. 2022)."""
    graph = graph_of(SERIES, macro={"staged": {"normalise": normalise}})
    params, series = random_params(graph), 100.0 * a_series()
    moved = forecast(graph, params, factor * series + 70.0)
    # 1e-5 is added to variances of about 1e4
    np.testing.assert_allclose(moved, factor * forecast(graph, params, series) + 70.0, rtol=1e-7)


def test_only_a_series_is_normalised():
    """A language model has no values to move."""
    with pytest.raises(InputError, match="no series to normalise"):
        graph_of(TOKENS, causal=True, macro={"staged": {"normalise": "last"}})


LINEAR: dict[str, Any] = {
    "block": {"token_mixer": "identity", "channel_mixer": "none"},
    "depth": 0,
    "norm": "none",
    "head": {"forecaster": {"source": "direct"}},
    "d_model": 5,
}


def test_no_layers_and_a_trend_of_one_value_are_a_linear_map():
    """With K = 1 the trend is the series and the rest is nothing: yhat = W_trend x + b_trend + b_rest."""
    graph, series = graph_of(SERIES, stem={"series_variates": {"trend_width": 1}}, **LINEAR), a_series()
    params = random_params(graph)
    expected = (series.T @ params["stem.trend"] + params["stem.trend_bias"] + params["stem.rest_bias"]).T
    np.testing.assert_allclose(forecast(graph, params, series), expected, atol=1e-12)


def test_forecasts_without_a_matrix_need_the_width_of_the_horizon():
    """Both sizes are named."""
    with pytest.raises(InputError, match="tokens are no forecasts"):
        graph_of(SERIES, stem="series_variates", **{**LINEAR, "d_model": 6})
    with pytest.raises(InputError, match="tokens are not variates"):
        graph_of(SERIES, stem="series_patches", head={"forecaster": {"source": "each"}})


def test_depth_zero_counts_once():
    """A model without layers is one model, whatever its layers might have been."""
    space = Space.from_dict(
        {
            "schema": 1,
            "name": "few",
            "model": {
                "signature": {"modality": "series", "output": "forecast", "seq_len": 8, "variates": 2, "horizon": 2},
                "d_model": 8,
                "depth": {"range": [0, 2, 1]},
            },
            "block": {
                "wiring": {"choice": ["pre_norm", "post_norm"]},
                "token_mixer": {"per_layer": True, "choice": ["pooling", "identity", "depthwise_conv"]},
                "channel_mixer": "none",
            },
        }
    )
    every = list(space.enumerate())
    assert len(every) == len(set(every)) == space.size() == 1 + 2 * 3 + 2 * 9
    assert every[0].describe().endswith("no layers")
    for architecture in every:
        assert type(architecture).from_dict(architecture.to_dict()) == architecture
        assert space.is_valid(architecture) is None


def looped(times: int, *, inject: bool = False, **model: Any) -> Graph:
    """A decoder of three layers whose middle one runs several times."""
    macro = {"looped": {"pre": 1, "post": 1, "times": times, "inject": inject}}
    return graph_of(TOKENS, depth=3, causal=True, macro=macro, **model)


@pytest.mark.parametrize("inject", [False, True])
def test_loop_of_one_turn_is_the_plain_stack(inject: bool):
    """T = 1 is the plain stack to the bit (Gao et al. 2024)."""
    loop, plain = looped(1, inject=inject), graph_of(TOKENS, depth=3, causal=True)
    params, tokens = random_params(plain), np.arange(8, dtype=np.int32)[None]
    found, expected = (evaluate(graph, {"tokens": tokens}, params)["logits"] for graph in (loop, plain))
    assert np.array_equal(found, expected)


def test_turns_change_no_parameter_and_repeat_the_layer():
    """Three turns are a plain stack of five layers of which three have the same weights."""
    loop, plain = looped(3), graph_of(TOKENS, depth=5, causal=True)
    params, tokens = random_params(loop), np.arange(8, dtype=np.int32)[None]
    assert set(params) == set(random_params(looped(9)))
    assert profile(loop).params == profile(looped(9)).params
    source = {"0": "0", "1": "1", "2": "1", "3": "1", "4": "2"}
    unrolled = {}
    for name in random_params(plain):
        scope, number, *rest = name.split(".")
        unrolled[name] = params[".".join([scope, source[number], *rest]) if scope == "layers" else name]
    found = evaluate(loop, {"tokens": tokens}, params)["logits"]
    assert np.array_equal(found, evaluate(plain, {"tokens": tokens}, unrolled)["logits"])
    assert not np.allclose(found, evaluate(looped(3, inject=True), {"tokens": tokens}, params)["logits"])


def test_loop_streams_with_states_for_each_turn():
    """One token at a time, each turn with keys and values of its own, gives what all tokens at once give."""
    macro = {"looped": {"pre": 1, "post": 1, "times": 2, "inject": True}}
    model = only_model(TOKENS, ATTENTION, depth=3, causal=True, macro=macro, position="rope")
    whole, step = model.graph(TOKENS), model.graph(TOKENS, mode="step")
    params, tokens = random_params(whole), np.random.default_rng(0).integers(0, 11, (1, 8)).astype(np.int32)
    types = {name: node.types[0] for name, node in step.inputs.items()}
    states = {name: np.zeros(kind.shape) for name, kind in types.items() if name.startswith("state.")}
    assert {"state.layers.1.mixer.k", "state.layers.1.mixer.turn1.k"} <= set(states)
    rows = []
    for t in range(8):
        position = np.asarray(t, np.int32)
        results = evaluate(step, {"tokens": tokens[:, t : t + 1], "position": position, **states}, params)
        states = {name: results[name] for name in states}
        rows.append(results["logits"][:, 0])
    expected = evaluate(whole, {"tokens": tokens}, params)["logits"]
    np.testing.assert_allclose(np.stack(rows, axis=1), expected, atol=1e-9)


def test_loop_needs_layers_for_its_parts():
    """One layer before, one after and none between is refused."""
    with pytest.raises(InputError, match="the macro looped cannot build this model"):
        graph_of(TOKENS, depth=2, causal=True, macro={"looped": {"pre": 1, "post": 1}})


def test_reused_parameter_is_the_same_one():
    """Inside `reuse` a taken name gives the parameter back, and another shape is refused."""
    b = Builder()
    first = b.parameter("w", ((Axis("a", 3),),))
    with b.reuse():
        assert b.parameter("w", ((Axis("a", 3),),)).value == first.value
        with pytest.raises(GraphError, match="reused as another one"):
            b.parameter("w", ((Axis("a", 4),),))
    with pytest.raises(GraphError, match="defined twice"):
        b.parameter("w", ((Axis("a", 3),),))
