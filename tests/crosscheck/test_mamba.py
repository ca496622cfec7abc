"""Mamba against transformers."""

from typing import Any

import numpy as np
import pytest
import torch

from ir.interpret import evaluate
from nas.checks.component import relative_error
from searchspaces.space import Space, shipped_spaces
from searchspaces.yaml_source import read_yaml
from tests.crosscheck.timm_models import TOLERANCE, Weights, divided, fitted, public_library, renamed, weights_of

pytestmark = pytest.mark.crosscheck
BATCH, TIME, VOCABULARY, WIDTH, DEPTH = 2, 13, 50, 32, 2
OPTIONS = {
    "published": {"state_dim": 16, "expand": 2.0, "conv_width": 4, "dt_rank": None},
    "other": {"state_dim": 5, "expand": 3.0, "conv_width": 3, "dt_rank": 7},
}
RULES = [
    (r"^backbone\.embeddings\.weight", "stem.embedding"),
    (r"^backbone\.norm_f\.weight", "norm.scale"),
    (r"^backbone\.", ""),
    (r"\.norm\.weight$", ".norm_mixer.scale"),
    (r"\.mixer\.conv1d\.weight$", ".mixer.conv"),
    (r"\.mixer\.conv1d\.bias$", ".mixer.conv_bias"),
    (r"\.mixer\.dt_proj\.weight$", ".mixer.dt_up"),
    (r"\.mixer\.dt_proj\.bias$", ".mixer.dt_bias"),
    (r"\.mixer\.out_proj\.weight$", ".mixer.out"),
    (r"\.mixer\.A_log$", ".mixer.a_log"),
    (r"\.mixer\.D$", ".mixer.skip"),
]


def zoo_space(options: dict[str, Any]) -> Space:
    """zoo/mamba with fewer layers, a smaller width and vocabulary, and these options of its mixer."""
    data: Any = read_yaml(shipped_spaces()["zoo/mamba"]).data
    signature = {**data["model"]["signature"], "seq_len": TIME, "vocab_size": VOCABULARY}
    model = {**data["model"], "signature": signature, "d_model": WIDTH, "depth": DEPTH}
    return Space.from_dict({**data, "model": model, "block": {**data["block"], "token_mixer": {"mamba": options}}})


def public_model(options: dict[str, Any]) -> torch.nn.Module:
    """The same model of transformers, with random weights."""
    transformers = public_library("transformers")
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        state_size=options["state_dim"],
        expand=int(options["expand"]),
        conv_kernel=options["conv_width"],
        time_step_rank=options["dt_rank"] or "auto",
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def our_weights(model: torch.nn.Module, state_dim: int) -> Weights:
    """The weights of a model of transformers by our names, those of joint projections apart."""
    weights = weights_of(model)
    embedding = weights.pop("lm_head.weight")  # tied
    assert np.array_equal(embedding, weights["backbone.embeddings.weight"])
    weights["backbone.embeddings.weight"] = embedding.T  # a table, not a product's matrix
    weights = {name: array.T if array.ndim == 3 else array for name, array in weights.items()}
    weights = divided(weights, ".in_proj.weight", lambda size: {".input": size // 2, ".gate": size // 2})
    weights = divided(
        weights,
        ".x_proj.weight",
        lambda size: {".dt_down": size - 2 * state_dim, ".b": state_dim, ".c": state_dim},
    )
    return renamed(weights, RULES)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_mamba_equals_transformers(options):
    """With the weights of transformers' model, zoo/mamba gives its logits, as a whole and token by token."""
    model = public_model(options)
    space = zoo_space(options)
    assert space.signature is not None
    architecture = space.smallest()
    whole = architecture.graph(space.signature, batch=BATCH)
    stream = architecture.graph(space.signature, batch=BATCH, mode="step")
    params = fitted(whole, our_weights(model, options["state_dim"]))
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, TIME)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    assert relative_error(evaluate(whole, {"tokens": tokens}, params)["logits"], expected) < TOLERANCE

    names = [name for name in stream.inputs if name not in ("tokens", "position")]
    state = {name: np.zeros(stream.inputs[name].types[0].shape) for name in names}
    for t in range(TIME):
        given = {"tokens": tokens[:, t : t + 1], "position": np.array(t, np.int32), **state}
        state = evaluate(stream, given, params)
        assert relative_error(state.pop("logits")[:, 0], expected[:, t]) < TOLERANCE
