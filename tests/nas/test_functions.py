"""Artifacts with several functions: sizes in buckets, `prefill` and `step` beside `forward`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import nas
from codegen import runtime, targets
from codegen.compile import compile_functions
from codegen.reference import torch_outputs
from ir.errors import InputError
from ir.graph import Graph
from ir.initializers import initialize
from nas.functions import make_sources
from searchspaces.architecture import Architecture, ComponentConfig, LayerConfig, ModelConfig, StageConfig
from searchspaces.signature import Signature

TOKENS = Signature(modality="tokens", output="next_token", seq_len=12, vocab_size=13)
TARGET = targets.get("cpu", threads=1)
TOLERANCE = 1e-4  # compiled code against torch, as when it is verified
GLA = ComponentConfig.of("gated_linear_attention", num_heads=2)
ATTENTION = ComponentConfig.of("softmax_attention", num_heads=2)
WINDOW = ComponentConfig.of("softmax_attention", num_heads=2, window=3)
MAMBA = ComponentConfig.of("mamba", state_dim=4)


def architecture(*mixers: ComponentConfig, causal: bool = True) -> Architecture:
    """A model of width 8 with a layer for each mixer."""
    none, norm = ComponentConfig("none"), ComponentConfig("rms_norm")
    layers = tuple(LayerConfig(ComponentConfig("pre_norm"), mixer, none) for mixer in mixers)
    position = ComponentConfig("rope")
    return Architecture(ModelConfig((StageConfig(8, layers),), norm, position, causal))


def builder(model: Architecture) -> Callable[..., Graph]:
    """What builds the graphs of a model."""
    return lambda **options: model.graph(TOKENS, **options)


def load(
    model: Architecture, folder: Path, batches: Sequence[int], lengths: Sequence[int], **wanted: bool
) -> tuple[runtime.LoadedModel, dict[str, np.ndarray]]:
    """Compile functions of a model and load them; return its parameters, too."""
    sources = make_sources(builder(model), batches, lengths, **{"step": False, "prefill": False, **wanted})
    params = initialize(sources["forward"].graph, 0)
    path = compile_functions(sources, params, TARGET).save(folder / "x.nas")
    return runtime.load(path), params


def draw(batch: int, tokens: int) -> np.ndarray:
    """Tokens."""
    return np.random.default_rng(batch * 100 + tokens).integers(0, 13, (batch, tokens), np.int32)


def only(output: runtime.Output) -> np.ndarray:
    """The output of a model that has one."""
    assert isinstance(output, np.ndarray)
    return output


def expect(model: Architecture, params: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """What torch gives at exactly this size."""
    graph = model.graph(TOKENS, batch=tokens.shape[0], seq_len=tokens.shape[1])
    return torch_outputs(graph, params, {"tokens": tokens})["logits"]


def test_buckets_serve_every_smaller_size(tmp_path: Path):
    """The smallest function that fits serves, rows and tokens are padded, and nothing of that is seen."""
    model = architecture(GLA)
    loaded, params = load(model, tmp_path, [1, 3], [4, 9])
    assert sorted(loaded.functions) == ["forward", "forward_b1_t9", "forward_b3_t4", "forward_b3_t9"]
    for batch, count in ((1, 4), (1, 1), (2, 3), (3, 9), (1, 7)):
        tokens = draw(batch, count)
        np.testing.assert_allclose(only(loaded(tokens)), expect(model, params, tokens), rtol=0, atol=TOLERANCE)
    for tokens in (draw(4, 4), draw(1, 10)):
        with pytest.raises(InputError, match="sizes"):
            loaded(tokens)
    with pytest.raises(InputError, match="shape"):
        loaded(draw(1, 4)[0])


def test_padding_is_refused_where_it_would_be_seen():
    """In a model that looks ahead the batch alone is padded."""
    sources = make_sources(builder(architecture(ATTENTION, causal=False)), [1, 2], [4, 8], step=False, prefill=False)
    assert {tuple(source.padded) for source in sources.values()} == {("batch",)}
    assert sources["forward_b2_t8"].axes == {"tokens": ("batch", "seq_len"), "logits": ("batch", "seq_len", None)}


def test_prefill_and_steps_make_the_whole(tmp_path: Path):
    """A prompt at once, then token by token, is the whole sequence; weights are there once."""
    model = architecture(GLA, ATTENTION)
    loaded, params = load(model, tmp_path, [], [5, 12], step=True, prefill=True)
    assert (loaded.prefill_lengths, "step" in loaded.functions) == ((5, 12), True)
    tokens = draw(1, 12)
    expected = expect(model, params, tokens)
    np.testing.assert_allclose(only(loaded.stream().feed(tokens[:, :8])), expected[:, :8], rtol=0, atol=TOLERANCE)
    start, state = loaded.prefill(tokens[:, :5])
    stream = loaded.stream(state)
    rest = stream.feed(tokens[:, 5:])
    assert stream.position == 12
    np.testing.assert_allclose(np.concatenate([only(start), only(rest)], 1), expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(InputError, match="longer than"):
        stream.step(tokens[:, :1])
    with pytest.raises(InputError, match="sizes"):
        loaded.prefill(tokens[:, :4])


def test_prefill_goes_through_short_convolutions():
    """States of convolutions take several tokens, too."""
    assert "prefill" in make_sources(builder(architecture(MAMBA)), [], [4], step=True, prefill=True)


def test_prefill_that_is_another_function_is_refused():
    """A window's state slides by one token a call."""
    with pytest.raises(InputError, match="token by token only"):
        make_sources(builder(architecture(WINDOW)), [], [6], step=False, prefill=True)


def test_artifact_is_compiled_again_with_all_its_functions(tmp_path: Path):
    """Roles, sizes and padding stay."""
    sources = make_sources(builder(architecture(GLA)), [1, 2], [], step=True, prefill=False)
    made = compile_functions(sources, initialize(sources["forward"].graph, 0), TARGET)
    again = nas.compile(made, target=TARGET)
    assert list(again.functions) == list(made.functions) == ["forward", "forward_b2", "step", "step_b2"]
    for name, function in made.functions.items():
        assert again.functions[name].inputs == function.inputs
        assert again.functions[name].padded == function.padded
    model = runtime.load(again.save(tmp_path / "again.nas"))
    output, _ = model.step(draw(2, 1))
    assert only(output).shape == (2, 1, 13)
    with pytest.raises(InputError, match="no such function"):
        nas.compile(made, target=TARGET, prefill=True)
