"""What every component of the registry has to keep, in every case it declares: the checks of `nas check`.

The compiled form has its own test, `test_compiled.py`.
"""

import numpy as np
import pytest

from ir.builder import Builder
from ir.component import KINDS, Position, TokenMixer
from ir.initializers import initialize
from ir.interpret import evaluate
from nas.checks.component import CHECKS, limit_holds, relative_error
from nas.checks.subjects import random_params, subjects
from searchspaces import reference, registry

ALONE = ("token_mixer", "channel_mixer", "norm", "reducer", "transition", "stem", "conditioner", "head", "block")
COMPONENTS = [
    pytest.param(kind, key, component, id=f"{kind}-{key}")
    for kind in KINDS
    for key, component in registry.components(kind).items()
]
LARGE = ("growth-manhattan_attention", "growth-offset_attention")
"""Checks of biases of all pairs of 16,384 tokens: gigabytes, and half a minute in all."""
CHECKED = [
    pytest.param(check, subject, id=name, marks=[pytest.mark.slow] * name.startswith(LARGE))
    for check in CHECKS
    for subject in subjects(*ALONE)
    if check.applies(subject)
    for name in [f"{check.name}-{subject.name}"]
]
LIMITS = [
    pytest.param(component, limit, id=f"{key}-{index}")
    for kind in ALONE
    for key, component in registry.components(kind).items()
    for index, limit in enumerate(component.limits)
]


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Assert agreement relative to the largest expected number."""
    assert relative_error(found, expected) <= tolerance


@pytest.mark.parametrize(("kind", "key", "component"), COMPONENTS)
def test_component_says_what_it_is(kind, key, component):
    """Key, kind, docstring, paper and option descriptions are there; defaults make a component."""
    assert component.key() == key
    assert component.kind == kind
    assert component.__doc__ and component.__doc__ != component.__mro__[1].__doc__
    assert component.paper or "none" in key, "every component but the absent ones has a source"
    assert all(spec.doc for spec in component.option_specs().values())
    assert component.create({}) == component()


@pytest.mark.parametrize(("check", "subject"), CHECKED)
def test_component_passes_its_checks(check, subject):
    """Round trips, reference, torch, gradients, causality, streaming, forms and growth, as far as each applies."""
    check.run(subject)


@pytest.mark.parametrize(("component", "limit"), LIMITS)
def test_component_contains_what_it_says(component, limit):
    """In the limit that it names, a component equals another one."""
    limit_holds(component, limit)


@pytest.mark.parametrize("key", registry.default_registry().keys("position"))
def test_position_streams_as_it_runs_at_once(key):
    """Embedding and rotation at a run-time position equal those of that position among all."""
    position, rng = position_of(key), np.random.default_rng(1)
    x, heads = rng.standard_normal((2, 5, 6)), rng.standard_normal((2, 5, 3, 4))
    whole = position_graph(position, 5, streaming=False)
    single = position_graph(position, 1, streaming=True)
    params = random_params(whole)
    expected = evaluate(whole, {"x": x, "heads": heads}, params)
    for t in range(5):
        given = {"x": x[:, t : t + 1], "heads": heads[:, t : t + 1], "position": np.array(t, np.int32)}
        found = evaluate(single, given, params)
        for name in found:
            close(found[name], expected[name][:, t : t + 1], 1e-12)


def test_rope_turns_heads_as_the_paper_says():
    """Queries and keys turn as complex numbers, and scores depend on the distance of tokens alone."""
    heads = np.random.default_rng(2).standard_normal((2, 5, 3, 4))
    graph = position_graph(position_of("rope"), 5, streaming=False)
    turned = evaluate(graph, {"x": np.zeros((2, 5, 6)), "heads": heads}, {})["heads_out"]
    close(turned, reference.rotate(heads), 1e-12)
    same = np.broadcast_to(heads[:, :1], heads.shape)
    turned = evaluate(graph, {"x": np.zeros((2, 5, 6)), "heads": same}, {})["heads_out"]
    scores = np.einsum("bthk,bshk->bhts", turned, turned)
    close(scores[..., 3, 1], scores[..., 4, 2], 1e-12)


def test_learned_position_adds_its_table():
    """Token t gets row t, also where fewer tokens come than the table knows."""
    graph = position_graph(position_of("learned"), 3, streaming=False)
    params, x = random_params(graph), np.random.default_rng(1).standard_normal((2, 3, 6))
    found = evaluate(graph, {"x": x, "heads": np.zeros((2, 3, 3, 4))}, params)["x_out"]
    assert params["table"].shape == (5, 6)
    close(found, x + params["table"][:3], 1e-12)


@pytest.mark.parametrize("tokens", [3, 4, 5])
def test_positions_on_the_plane_tell_column_and_row(tokens):
    """Six channels: sine, cosine and sine of the column, then of the row, on a square of side 3 for 5 tokens."""
    graph = position_graph(position_of("sinusoidal2d"), tokens, streaming=False)
    found = evaluate(graph, {"x": np.zeros((2, tokens, 6)), "heads": np.zeros((2, tokens, 3, 4))}, initialize(graph, 0))
    slow = 10000.0 ** (-2 / 3)
    for t in range(tokens):
        waves = [[np.sin(n), np.cos(n), np.sin(n * slow)] for n in (t % 3, t // 3)]
        close(found["x_out"][1, t], np.concatenate(waves), 1e-6)  # the table is float32


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2**-8]),
        (8, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (12, [*(2**-i for i in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)
def test_alibi_slopes_are_the_published_ones(heads, slopes):
    """Powers of two as in the paper, other numbers of heads as in the authors' code."""
    assert position_of("alibi").slopes(heads) == pytest.approx(slopes, rel=1e-12)


def position_of(key: str) -> Position:
    """A position component with default options."""
    position = registry.get("position", key)()
    assert isinstance(position, Position)
    return position


def position_graph(position: Position, tokens: int, *, streaming: bool):
    """Both hooks of a position that knows 5 tokens, on embeddings `[2, T, 6]` and heads `[2, T, 3, 4]`."""
    b = Builder()
    at = b.input("position", (), "int32") if streaming else None
    x, heads = b.input("x", (2, tokens, 6)), b.input("heads", (2, tokens, 3, 4))
    return b.build(x_out=position.embed(b, x, 5, at), heads_out=position.rotate(b, heads, at))


def test_attention_with_a_window_keeps_a_bounded_state():
    """Windowed attention stops growing with the stream, full attention does not."""
    shapes = {}
    for window in (0, 4):
        mixer = registry.get("token_mixer", "softmax_attention").create({"num_heads": 3, "window": window})
        assert isinstance(mixer, TokenMixer)
        shapes[window] = mixer.state(1, 12, 100)["k"].shape
    assert shapes == {0: (1, 100, 3, 4), 4: (1, 3, 3, 4)}
