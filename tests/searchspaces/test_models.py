"""Whole models: stems, positions, layers and heads put together by the isotropic macro."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from codegen.torch_backend import to_module
from ir.component import Position, option
from ir.errors import InputError
from ir.hashing import canonical_hash
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.ops.elementwise import Gelu
from ir.ops.normalization import LayerNorm
from ir.ops.structure import Component
from ir.passes.expand_components import ExpandComponents
from ir.verify import verify
from searchspaces import registry, resolve
from searchspaces.architecture import Architecture, ComponentConfig, LayerConfig, ModelConfig, StageConfig
from searchspaces.signature import Condition, Signature

of = ComponentConfig.of
TEXT = Signature(modality="tokens", output="next_token", seq_len=9, vocab_size=13)
LABELLED = Signature(modality="tokens", output="class", seq_len=9, vocab_size=13, num_classes=5)
IMAGE = Signature(modality="image", output="class", image_size=6, channels=3, num_classes=5)
SERIES = Signature(modality="series", output="forecast", seq_len=11, variates=2, horizon=3)
VIDEO = Signature(modality="video", output="forecast", seq_len=2, image_size=8, channels=1, horizon=3)
TIMED = Condition(timestep=True, num_labels=3)
NOISY = Signature(modality="image", output="denoise", image_size=6, channels=3, out_channels=6, condition=TIMED)
SIGNATURES = {"text": TEXT, "labelled": LABELLED, "image": IMAGE, "series": SERIES, "video": VIDEO, "noisy": NOISY}
WIRINGS = registry.components("block")
CONDITIONED = {key for key, wiring in WIRINGS.items() if getattr(wiring, "conditioned", False)}
ATTENTION = of("softmax_attention", num_heads=2)
MIXERS = {
    "softmax_attention": of("softmax_attention", num_heads=2, num_kv_heads=1, window=4),
    "gated_linear_attention": of("gated_linear_attention", num_heads=2),
    "retention": of("retention", num_heads=2),
    "mamba": of("mamba", state_dim=3),
    "linear_attention": of("linear_attention", num_heads=2),
    "pooling": of("pooling"),
    "depthwise_conv": of("depthwise_conv", kernel_size=3),
    "identity": of("identity"),
}


def architecture(
    *mixers: ComponentConfig, wiring="pre_norm", channel="mlp", norm="rms_norm", position="none", causal=True, **ends
) -> Architecture:
    """A model of width 12 with one layer for each mixer."""
    layers = tuple(LayerConfig(of(wiring), mixer, of(channel)) for mixer in mixers)
    return Architecture(ModelConfig((StageConfig(12, layers),), of(norm), of(position), causal, **ends))


def random_input(signature: Signature, batch: int, seed: int = 0) -> np.ndarray:
    """Tokens as int32, or float32 numbers."""
    rng, shape = np.random.default_rng(seed), signature.input_shape(batch)
    if signature.modality == "tokens":
        return rng.integers(0, signature.vocab_size, shape).astype(np.int32)
    return rng.standard_normal(shape).astype(np.float32)


def count(graph) -> int:
    """Numbers in all parameters."""
    return sum(node.types[0].size for node in graph.parameters.values())


@pytest.mark.parametrize("task", SIGNATURES)
@pytest.mark.parametrize("channel", ["mlp", "swiglu", "none"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_model_trains_with_every_wiring_and_end(wiring, channel, task):
    """The graph verifies, has the task's inputs and output, and a loss sends finite gradients to every parameter."""
    signature = SIGNATURES[task]
    causal = signature.output == "next_token"
    if wiring in CONDITIONED:
        if causal:
            with pytest.raises(InputError, match="condition"):
                dataclasses.replace(signature, condition=TIMED)
            return
        signature = dataclasses.replace(signature, condition=TIMED)
    model = architecture(ATTENTION, of("mamba"), wiring=wiring, channel=channel, position="learned", causal=causal)
    graph = verify(model.graph(signature, batch=2))
    ((name, value),) = graph.outputs
    assert (name, graph.type_of(value).shape) == (signature.output_name, signature.output_shape(2))
    module = to_module(graph, seed=0)
    given = {signature.input_name: torch.from_numpy(random_input(signature, 2))}
    side = {"timestep": torch.tensor([0.5, 7.0]), "label": torch.tensor([0, 2])} if signature.condition else {}
    module(**given, **side)[name].square().mean().backward()
    for parameter, tensor in module.named_parameters():
        assert tensor.grad is not None, f"{parameter} is not used"
        assert torch.isfinite(tensor.grad).all(), parameter


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_untrained_language_model_knows_nothing_and_says_so(mixer):
    """Before training the loss is that of equal chances, ln(vocabulary): no token mixer starts out loud."""
    graph = architecture(mixer, mixer, channel="swiglu").graph(TEXT, batch=4)
    logits = evaluate(graph, {"tokens": random_input(TEXT, 4)}, initialize(graph, 0))["logits"]
    targets = random_input(TEXT, 4, seed=1)
    chosen = np.take_along_axis(logits, targets[..., None].astype(np.int64), axis=-1)[..., 0]
    loss = (np.log(np.exp(logits).sum(axis=-1)) - chosen).mean()
    assert loss == pytest.approx(math.log(TEXT.vocab_size), abs=0.1)


@pytest.mark.parametrize("position", registry.default_registry().keys("position"))
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_streaming_model_equals_parallel_model(mixer, position):
    """The step graph, fed its own states, gives token by token the logits of the whole sequence."""
    model = architecture(mixer, ATTENTION, position=position, wiring="parallel")
    whole, stream = model.graph(TEXT, batch=2), verify(model.graph(TEXT, batch=2, mode="step"))
    params, tokens = initialize(whole, 0), random_input(TEXT, 2)
    expected = evaluate(whole, {"tokens": tokens}, params)["logits"]
    names = [name for name in stream.inputs if name not in ("tokens", "position")]
    assert [name for name, _ in stream.outputs] == ["logits", *names]
    state = {name: np.zeros(stream.inputs[name].types[0].shape) for name in names}
    for t in range(TEXT.seq_len):
        given = {"tokens": tokens[:, t : t + 1], "position": np.array(t, np.int32), **state}
        state = evaluate(stream, given, params)
        # Both run in float64: what differs is the order of sums.
        np.testing.assert_allclose(state.pop("logits")[:, 0], expected[:, t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_decoder_is_causal_and_encoder_is_not(causal):
    """Changing the last token leaves a decoder's earlier logits as they were, and changes an encoder's."""
    graph = architecture(*MIXERS.values(), causal=causal, position="alibi").graph(TEXT)
    params, tokens = initialize(graph, 0), random_input(TEXT, 1)
    changed = tokens.copy()
    changed[0, -1] = (changed[0, -1] + 1) % TEXT.vocab_size
    before, after = (evaluate(graph, {"tokens": given}, params)["logits"] for given in (tokens, changed))
    assert np.array_equal(before[:, :-1], after[:, :-1]) is causal


def test_parameter_count_is_the_one_by_hand():
    """Embedding, two layers of grouped attention and SwiGLU with their norms, last norm; the head is tied."""
    mixer = of("softmax_attention", num_heads=4, num_kv_heads=2)
    graph = architecture(mixer, mixer, channel="swiglu").graph(TEXT)
    embedding = 13 * 12
    attention = 12 * 12 + 2 * (12 * 6) + 12 * 12
    swiglu = 3 * 12 * 40  # 2.667 * 12 is above 32, and the next multiple of 8 is 40
    assert count(graph) == embedding + 2 * (attention + swiglu + 2 * 12) + 12


def test_tied_head_reads_the_embedding():
    """A tied head adds no parameter; an untied one adds vocabulary * width."""
    tied = architecture(ATTENTION).graph(TEXT)
    untied = architecture(ATTENTION, head=of("language_model", tied=False)).graph(TEXT)
    assert set(untied.parameters) - set(tied.parameters) == {"head.weight"}
    assert count(untied) - count(tied) == 13 * 12
    assert len(tied.users(tied.parameters["stem.embedding"].results[0])) == 2


def test_parameters_are_named_by_their_place():
    """Names are scope paths, the same for every batch, length and mode, so that weights move between graphs."""
    model = architecture(ATTENTION, of("pooling"), norm="layer_norm", position="learned")
    graph = model.graph(TEXT)
    layers = [f"layers.0.mixer.{name}" for name in ("k", "out", "q", "v")]
    for layer in ("layers.0", "layers.1"):
        layers += [f"{layer}.channel_mixer.{name}" for name in ("down", "up")]
        layers += [f"{layer}.{norm}.{name}" for norm in ("norm_channel", "norm_mixer") for name in ("bias", "scale")]
    assert sorted(graph.parameters) == sorted([*layers, "norm.bias", "norm.scale", "position.table", "stem.embedding"])
    shapes = {name: node.types[0].shape for name, node in graph.parameters.items()}
    for other in (model.graph(TEXT, batch=3, seq_len=4), model.graph(TEXT, mode="step")):
        assert {name: node.types[0].shape for name, node in other.parameters.items()} == shapes


def test_layer_without_channel_mixer_has_one_branch():
    """`none` leaves out the norm of that branch too."""
    graph = architecture(ATTENTION, channel="none").graph(TEXT)
    assert not [name for name in graph.parameters if "channel" in name]


def test_model_ends_with_one_norm():
    """Post-norm layers end with a norm already; before the head of others comes one more."""
    post = architecture(ATTENTION, wiring="post_norm", norm="layer_norm").graph(TEXT)
    pre = architecture(ATTENTION, wiring="pre_norm", norm="layer_norm").graph(TEXT)
    assert [sum(isinstance(node.op, LayerNorm) for node in graph.nodes) for graph in (post, pre)] == [2, 3]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_compact_model_expands_to_the_same_graph(wiring):
    """Norms and mixers as single nodes, expanded by the pass, give the graph that is built at once."""
    model = architecture(*MIXERS.values(), of("softmax_attention", num_heads=3), wiring=wiring, position="alibi")
    signature = dataclasses.replace(LABELLED, condition=TIMED) if wiring in CONDITIONED else TEXT
    compact, expanded = model.graph(signature, batch=2, expanded=False), model.graph(signature, batch=2)
    verify(compact, allow_components=True)
    calls = [node.op.kind for node in compact.nodes if isinstance(node.op, Component)]
    assert calls.count("token_mixer") == calls.count("channel_mixer") == 9
    again = ExpandComponents(registry.get)(compact)
    assert canonical_hash(again) == canonical_hash(expanded)
    assert set(again.parameters) == set(expanded.parameters)


def test_alias_brings_its_options():
    """A model may name a component by an alias; `geglu` is a GLU with GELU."""
    graph = architecture(of("gla", num_heads=2), channel="geglu").graph(TEXT)
    assert any(isinstance(node.op, Gelu) for node in graph.nodes)
    assert "layers.0.mixer.gate_down" in graph.parameters


def test_last_stretch_of_a_series_is_read():
    """Where patches do not fill the series, its oldest values are left out, never the newest."""
    graph = architecture(ATTENTION, causal=False).graph(SERIES)
    params, series = initialize(graph, 0), random_input(SERIES, 1)
    expected = evaluate(graph, {"series": series}, params)["forecast"]
    for time, matters in ((2, False), (3, True), (10, True)):
        changed = series.copy()
        changed[:, time] += 1.0
        found = evaluate(graph, {"series": changed}, params)["forecast"]
        assert bool(np.abs(found - expected).max() > 1e-9) is matters


MALFORMED = {
    "mixer_looks_ahead": (
        lambda: architecture(of("softmax_attention", causal=False)).graph(TEXT),
        "layers.0.mixer",
        "ahead",
    ),
    "heads_do_not_divide": (lambda: architecture(of("retention", num_heads=5)).graph(TEXT), "layers.0.mixer", "5"),
    "odd_heads_with_rope": (
        lambda: architecture(of("softmax_attention", num_heads=4), position="rope").graph(TEXT),
        "layers.0.mixer",
        "even",
    ),
    "unknown_option": (lambda: architecture(of("mamba", state=3)).graph(TEXT), "layers.0.mixer", "state_dim"),
    "option_too_small": (lambda: architecture(of("mamba", state_dim=0)).graph(TEXT), "layers.0.mixer", "at least 1"),
    "unknown_mixer": (lambda: architecture(of("mambo")).graph(TEXT), None, "mamba"),
    "wrong_stem": (lambda: architecture(ATTENTION, stem=of("image_patches")).graph(TEXT), "stem", "tokens"),
    "wrong_head": (lambda: architecture(ATTENTION, head=of("classifier")).graph(TEXT), "head", "next_token"),
    "patch_does_not_divide": (
        lambda: architecture(ATTENTION, causal=False, stem=of("image_patches", patch_size=4)).graph(IMAGE),
        "stem",
        "patch_size 4",
    ),
    "series_shorter_than_a_patch": (
        lambda: architecture(ATTENTION, causal=False).graph(SERIES, seq_len=3),
        "seq_len",
        "patch_size 4",
    ),
    "image_of_another_length": (lambda: architecture(ATTENTION, causal=False).graph(IMAGE, seq_len=7), "seq_len", "36"),
    "longer_than_learned_positions": (
        lambda: architecture(ATTENTION, position="learned").graph(TEXT, seq_len=10),
        "position",
        "at most 9",
    ),
    "stream_longer_than_learned_positions": (
        lambda: architecture(ATTENTION, position="learned").graph(TEXT, mode="step", max_len=10),
        "position",
        "at most 9",
    ),
    "stream_of_an_encoder": (lambda: architecture(ATTENTION, causal=False).graph(TEXT, mode="step"), "mode", "causal"),
    "stream_of_images": (lambda: architecture(ATTENTION).graph(IMAGE, mode="step"), "mode", "next_token"),
    "no_batch": (lambda: architecture(ATTENTION).graph(TEXT, batch=0), "batch", "0"),
}


@pytest.mark.parametrize(("build", "where", "says"), MALFORMED.values(), ids=MALFORMED)
def test_model_that_does_not_fit_is_refused(build, where, says):
    """Bad input is one clear error that names the place and what is wrong with it."""
    with pytest.raises(InputError) as caught:
        build()
    assert caught.value.where is None or caught.value.where.startswith(where or "")
    assert says in str(caught.value)


def test_position_with_options_is_refused(monkeypatch):
    """Attention finds its position by key alone, so options of one would be lost without notice."""

    class Wavy(Position):
        width: int = option(3, doc="Tokens in a wave.")

    class Wider:
        def lookup(self, kind, name):
            return registry.Entry(name, Wavy) if name == "wavy" else registry.default_registry().lookup(kind, name)

    monkeypatch.setattr(resolve, "default_registry", Wider)
    model = architecture(MIXERS["mamba"], position="wavy").model
    resolve.resolve_model(model, TEXT)
    with pytest.raises(InputError, match="options of a position"):
        resolve.resolve_model(dataclasses.replace(model, position=of("wavy", width=5)), TEXT)
