"""What every component of the registry has to keep, in every case it declares.

The compiled form has its own test, `test_compiled.py`; both take their subjects from `conformance.py`.
"""

import itertools

import numpy as np
import pytest
import torch

from codegen.torch_backend import to_module
from ir.builder import Builder
from ir.component import Position, TokenMixer
from ir.cost import profile
from ir.interpret import evaluate
from ir.serialize import graph_from_json, graph_to_json
from ir.text import parse_graph, print_graph
from ir.verify import verify
from searchspaces import reference, registry
from tests.searchspaces.conformance import (
    CAUSAL,
    EVERYTHING,
    LOOKING_BOTH_WAYS,
    MIXERS,
    TOKENWISE,
    WITH_FORMS,
    Subject,
    each,
    random_input,
    random_params,
    run,
    zero_state,
)

KINDS = ("token_mixer", "channel_mixer", "norm", "position", "block", "macro", "stem", "head")
COMPONENTS = [
    pytest.param(kind, key, component, id=f"{kind}-{key}")
    for kind in KINDS
    for key, component in registry.components(kind).items()
]


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Assert agreement relative to the largest expected number."""
    assert found.shape == expected.shape
    scale = max(np.abs(expected).max(), 1e-30)
    assert np.abs(found - expected).max() <= tolerance * scale


@pytest.mark.parametrize(("kind", "key", "component"), COMPONENTS)
def test_component_says_what_it_is(kind, key, component):
    """Key, kind, docstring, paper and option descriptions are there; defaults make a component."""
    assert component.key() == key
    assert component.kind == kind
    assert component.__doc__ and component.__doc__ != component.__mro__[1].__doc__
    assert component.paper or "none" in key, "every component but the absent ones has a source"
    assert all(spec.doc for spec in component.option_specs().values())
    assert component.create({}) == component()


@each(EVERYTHING)
def test_graph_verifies_and_round_trips(subject: Subject):
    """The graph keeps the rules of the IR, and text and JSON give it back exactly."""
    graph = verify(subject.graph())
    for again in (parse_graph(print_graph(graph)), graph_from_json(graph_to_json(graph))):
        assert (again.nodes, again.outputs) == (graph.nodes, graph.outputs)


@each(EVERYTHING)
def test_graph_equals_the_reference(subject: Subject):
    """The graph computes the paper's equation; both run in float64, so only the order of sums differs."""
    graph = subject.graph()
    params, x = random_params(graph), random_input(graph)
    close(run(graph, params, x), subject.reference(params, x), 1e-9)


@each(EVERYTHING)
def test_examples_of_a_batch_do_not_mix(subject: Subject):
    """Changing one example of a batch leaves the others' results as they were, bit for bit."""
    graph = subject.resized(batch=3).graph()
    params, x = random_params(graph), random_input(graph)
    changed = x.copy()
    changed[1] = random_input(graph, seed=2)[1]
    before, after = run(graph, params, x), run(graph, params, changed)
    assert np.array_equal(before[[0, 2]], after[[0, 2]])
    assert not np.array_equal(before[1], after[1])


@each(CAUSAL)
def test_causal_mixer_does_not_look_ahead(subject: Subject):
    """Changing token t leaves every output before t as it was, and changes one from t on."""
    graph = subject.resized(time=7).graph()
    params, x = random_params(graph), random_input(graph)
    for t in (1, 4, 6):
        changed = x.copy()
        changed[:, t] += 1.0
        before, after = run(graph, params, x), run(graph, params, changed)
        assert np.array_equal(before[:, :t], after[:, :t])
        assert not np.array_equal(before[:, t:], after[:, t:])


@each(LOOKING_BOTH_WAYS)
def test_bidirectional_mixer_looks_ahead(subject: Subject):
    """Changing token t changes the output before it: the mixer is rightly kept out of decoders."""
    graph = subject.resized(time=7).graph()
    params, x = random_params(graph), random_input(graph)
    changed = x.copy()
    changed[:, 4] += 1.0
    assert np.abs(run(graph, params, x)[:, 3] - run(graph, params, changed)[:, 3]).max() > 1e-6


@each(TOKENWISE)
def test_tokenwise_component_keeps_tokens_apart(subject: Subject):
    """Changing one token changes no other token's result."""
    graph = subject.resized(time=5).graph()
    params, x = random_params(graph), random_input(graph)
    changed = x.copy()
    changed[:, 2] += 1.0
    others = [0, 1, 3, 4]
    assert np.array_equal(run(graph, params, x)[:, others], run(graph, params, changed)[:, others])


@each(EVERYTHING)
def test_torch_equals_numpy(subject: Subject):
    """The torch module agrees with the interpreter: closely in float64, to rounding in float32."""
    graph = subject.graph()
    params, x = random_params(graph), random_input(graph)
    expected = run(graph, params, x)
    close(in_torch(subject, params, x, torch.float64), expected, 1e-10)
    close(in_torch(subject, params, x, torch.float32), expected, 1e-4)


@each(WITH_FORMS)
def test_forms_agree(subject: Subject):
    """Every form computes the same function, over more tokens than one chunk holds; float64 leaves rounding only."""
    subject = subject.resized(time=70)
    params, x = random_params(subject.graph()), random_input(subject.graph())
    expected = in_torch(subject.with_form("recurrent"), params, x, torch.float64)
    for form in subject.mixer.forms:
        close(in_torch(subject.with_form(form), params, x, torch.float64), expected, 1e-10)


@each(EVERYTHING)
def test_gradients_equal_finite_differences(subject: Subject):
    """The slope of a random loss along a random direction, by torch and by central differences of the interpreter.

    A step of 1e-6 in float64 leaves an error of about 1e-9 from rounding and less from curvature.
    """
    graph = subject.graph()
    params, x = random_params(graph), random_input(graph)
    rng = np.random.default_rng(3)
    weights = rng.standard_normal(graph.type_of(graph.outputs[0][1]).shape)
    along = {name: rng.standard_normal(array.shape) for name, array in params.items()}
    along_x = rng.standard_normal(x.shape) if x.dtype.kind == "f" else np.zeros_like(x)

    def loss(step: float) -> float:
        moved = {name: params[name] + step * along[name] for name in params}
        return float((weights * run(graph, moved, x + (step * along_x).astype(x.dtype))).sum())

    module = to_module(graph, params, dtype=torch.float64)
    given = torch.from_numpy(x).requires_grad_(x.dtype.kind == "f")
    (torch.from_numpy(weights) * module(x=given)["y"]).sum().backward()
    pairs = [(given, along_x), *((weight, along[name]) for name, weight in module.named_parameters())]
    slope = sum(float((tensor.grad.numpy() * way).sum()) for tensor, way in pairs if tensor.grad is not None)
    assert slope == pytest.approx((loss(1e-6) - loss(-1e-6)) / 2e-6, rel=1e-6, abs=1e-6)


@each(CAUSAL)
def test_streaming_equals_parallel(subject: Subject):
    """Token by token from zero states, in numpy and in torch, a causal mixer gives what it gives at once."""
    graph = subject.graph()
    params, x = random_params(graph), random_input(graph)
    stream = verify(subject.step_graph(max_len=subject.case.time + 2))
    assert set(stream.parameters) == set(graph.parameters)
    module = to_module(stream, params, dtype=torch.float64)
    state = zero_state(stream)
    outputs = []
    for t in range(subject.case.time):
        given = {"x": x[:, t : t + 1], "position": np.array(t, np.int32), **state}
        state = evaluate(stream, given, params)
        in_module = module(**{name: torch.from_numpy(np.asarray(array)) for name, array in given.items()})
        for name, array in state.items():
            close(in_module[name].detach().numpy(), array, 1e-10)
        outputs.append(state.pop("y"))
    close(np.concatenate(outputs, axis=1), run(graph, params, x), 1e-9)


@each(CAUSAL)
def test_streaming_fits_every_max_len(subject: Subject):
    """The state may be as short as the stream itself: one token, and exactly all of them."""
    for max_len in (1, 2, 3, 4, 5):
        short = subject.resized(time=max_len)
        graph, stream = short.graph(), short.step_graph(max_len)
        params, x = random_params(graph), random_input(graph)
        state, last = zero_state(stream), np.zeros(0)
        for t in range(max_len):
            state = evaluate(stream, {"x": x[:, t : t + 1], "position": np.array(t, np.int32), **state}, params)
            last = state.pop("y")
        close(last, run(graph, params, x)[:, -1:], 1e-9)


@each(MIXERS)
def test_flops_grow_with_tokens_as_declared(subject: Subject):
    """FLOPs at T, 2T and 4T tokens have the declared exponent; projections still weigh a little at these lengths."""
    flops = [profile(subject.resized(batch=1, time=time).graph()).flops for time in (256, 512, 1024)]
    declared = subject.mixer.growth_exponent()
    for shorter, longer in itertools.pairwise(flops):
        measured = np.log2(longer / shorter) if shorter else 0.0
        assert measured == pytest.approx(declared, abs=0.15)


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


def in_torch(subject: Subject, params, x, dtype) -> np.ndarray:
    """The component's output by the torch backend."""
    module = to_module(subject.graph(), params, dtype=dtype)
    given = torch.from_numpy(x)
    with torch.no_grad():
        return module(x=given.to(dtype) if given.is_floating_point() else given)["y"].double().numpy()


def test_attention_with_a_window_keeps_a_bounded_state():
    """Windowed attention stops growing with the stream, full attention does not."""
    shapes = {}
    for window in (0, 4):
        mixer = registry.get("token_mixer", "softmax_attention").create({"num_heads": 3, "window": window})
        assert isinstance(mixer, TokenMixer)
        shapes[window] = mixer.state(1, 12, 100)["k"].shape
    assert shapes == {0: (1, 100, 3, 4), 4: (1, 3, 3, 4)}
