"""What every component has to keep, one function a check: each returns its figure or raises `CheckFailed`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from ir.builder import Builder
from ir.component import ChannelMixer, Component, Limit, Norm, TokenMixer
from ir.cost import profile
from ir.errors import NasError
from ir.graph import Graph
from ir.interpret import evaluate
from ir.op import Array
from ir.serialize import graph_from_json, graph_to_json
from ir.text import parse_graph, print_graph
from ir.verify import verify
from nas.checks.subjects import SCOPE, Subject, random_inputs, random_params, run, zero_state
from searchspaces.registry import get

ROUNDING_64: Final = 1e-9
"""Relative error that another order of float64 sums explains."""
ROUNDING_32: Final = 1e-4
"""The same for float32."""
SLOPE_ERROR: Final = 1e-5
"""Relative error of central differences at a step of 1e-6: 1e-9 of it rounding, the rest curvature."""
GROWTH_ERROR: Final = 0.15
"""What projections still weigh in an exponent at the lengths it is measured at."""
STEP: Final = 1e-6


class CheckFailed(NasError):
    """A component does not keep what every component has to."""


@dataclass(frozen=True)
class Check:
    """A check of components.

    Attributes:
        name: What reports call it.
        applies: Whether a component is subject to it.
        run: Returns the figure, if it has one; raises `CheckFailed`.
    """

    name: str
    applies: Callable[[Subject], bool]
    run: Callable[[Subject], float | None]


def relative_error(found: Array, expected: Array) -> float:
    """Largest difference over the largest expected number."""
    if found.shape != expected.shape:
        raise CheckFailed("another shape", expected=str(expected.shape), found=str(found.shape))
    scale = max(float(np.abs(expected).max()), 1e-30)
    return float(np.abs(found - expected).max()) / scale


def require_close(found: Array, expected: Array, tolerance: float, what: str) -> float:
    """Return the relative error.

    Raises:
        CheckFailed: It is above the tolerance.
    """
    error = relative_error(found, expected)
    if not error <= tolerance:
        raise CheckFailed(
            f"{what} differ", expected=f"at most {tolerance:g} of the largest value", found=f"{error:.3g}"
        )
    return error


def round_trips(subject: Subject) -> None:
    """The graph keeps the rules of the IR, and text and JSON give it back exactly."""
    graph_round_trips(subject.graph())


def graph_round_trips(graph: Graph) -> None:
    """A graph keeps the rules of the IR, and text and JSON give it back exactly."""
    verify(graph)
    for form, again in (("text", parse_graph(print_graph(graph))), ("JSON", graph_from_json(graph_to_json(graph)))):
        if (again.nodes, again.outputs) != (graph.nodes, graph.outputs):
            raise CheckFailed(f"{form} gives another graph back")


def equals_reference(subject: Subject) -> float:
    """The graph computes the paper's equation; both run in float64, so only the order of sums differs."""
    graph = subject.graph()
    params, inputs = random_params(graph), random_inputs(graph)
    expected = subject.reference(params, inputs)
    return require_close(run(graph, params, inputs), expected, ROUNDING_64, "graph and reference")


def keeps_examples_apart(subject: Subject) -> None:
    """Changing one example of a batch leaves the others' results as they were, bit for bit."""
    graph = subject.resized(batch=3).graph()
    params, inputs = random_params(graph), random_inputs(graph)
    changed = {name: array.copy() for name, array in inputs.items()}
    for name, other in random_inputs(graph, seed=2).items():
        changed[name][1] = other[1]
    before, after = run(graph, params, inputs), run(graph, params, changed)
    if not np.array_equal(before[[0, 2]], after[[0, 2]]):
        raise CheckFailed("an example changes with its neighbour in the batch")
    if np.array_equal(before[1], after[1]):
        raise CheckFailed("the output does not depend on the input")


def does_not_look_ahead(subject: Subject) -> None:
    """Changing token t leaves every output before t as it was, and changes one from t on."""
    graph = subject.resized(time=7).graph()
    params, inputs = random_params(graph), random_inputs(graph)
    for t in (1, 4, 6):
        changed = {**inputs, "x": inputs["x"].copy()}
        changed["x"][:, t] += 1.0
        before, after = run(graph, params, inputs), run(graph, params, changed)
        if not np.array_equal(before[:, :t], after[:, :t]):
            raise CheckFailed("a causal mixer sees later tokens", where=f"token {t}")
        if np.array_equal(before[:, t:], after[:, t:]):
            raise CheckFailed("a token changes nothing", where=f"token {t}")


def looks_ahead(subject: Subject) -> None:
    """Changing a later token changes an output before it: the mixer is rightly kept out of decoders."""
    graph = (subject if subject.case.time > 2 else subject.resized(time=7)).graph()
    params, inputs = random_params(graph), random_inputs(graph)
    width = inputs["x"].shape[-1]
    flat = inputs["x"].reshape(subject.case.batch, -1, width)
    middle = flat.shape[1] // 2 + 1
    changed = flat.copy()
    changed[:, middle] += np.random.default_rng(5).standard_normal(width)  # not a shift, which a norm would undo
    before = run(graph, params, inputs).reshape(flat.shape)
    after = run(graph, params, {**inputs, "x": changed.reshape(inputs["x"].shape)}).reshape(flat.shape)
    if not np.abs(before[:, :middle] - after[:, :middle]).max() > 1e-6:
        raise CheckFailed("a bidirectional mixer sees earlier tokens only", hint="declare it causal")


def keeps_tokens_apart(subject: Subject) -> None:
    """Changing one token changes no other token's result."""
    graph = subject.resized(time=5).graph()
    params, inputs = random_params(graph), random_inputs(graph)
    changed = {**inputs, "x": inputs["x"].copy()}
    changed["x"][:, 2] += 1.0
    others = [0, 1, 3, 4]
    if not np.array_equal(run(graph, params, inputs)[:, others], run(graph, params, changed)[:, others]):
        raise CheckFailed("tokens mix in a component that must keep them apart")


def torch_equals_numpy(subject: Subject) -> float:
    """The torch module agrees with the interpreter: closely in float64, to rounding in float32."""
    graph = subject.graph()
    params, inputs = random_params(graph), random_inputs(graph)
    expected = run(graph, params, inputs)
    require_close(in_torch(graph, params, inputs, "float64"), expected, ROUNDING_64, "torch and numpy, float64,")
    return require_close(in_torch(graph, params, inputs, "float32"), expected, ROUNDING_32, "torch and numpy")


def in_torch(graph: Graph, params: Mapping[str, Array], inputs: Mapping[str, Array], dtype: str) -> Array:
    """The output `y` by the torch backend, as float64."""
    import torch

    from codegen.torch_backend import DTYPES, to_module

    module = to_module(graph, params, dtype=DTYPES.get(dtype, torch.float64)).eval()
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        cast = {
            name: x.to(DTYPES.get(dtype, torch.float64)) if x.is_floating_point() else x for name, x in given.items()
        }
        return module(**cast)["y"].double().numpy()


def forms_agree(subject: Subject) -> float:
    """Every form computes the same function, over more tokens than one chunk holds; float64 leaves rounding only."""
    subject = subject.resized(time=70)
    graph = subject.graph()
    params, inputs = random_params(graph), random_inputs(graph)
    expected = in_torch(subject.with_form("recurrent").graph(), params, inputs, "float64")
    errors = [
        require_close(in_torch(subject.with_form(form).graph(), params, inputs, "float64"), expected, ROUNDING_64, form)
        for form in subject.mixer.forms
    ]
    return max(errors)


def gradients_equal_differences(subject: Subject) -> float:
    """The slope of a random loss along a random direction, by torch and by central differences of the interpreter."""
    import torch

    from codegen.torch_backend import to_module

    graph = subject.graph()
    params, inputs = random_params(graph), random_inputs(graph)
    rng = np.random.default_rng(3)
    weights = rng.standard_normal(graph.type_of(graph.outputs[0][1]).shape)
    along = {name: rng.standard_normal(array.shape) for name, array in params.items()}
    along_inputs = {name: rng.standard_normal(array.shape) for name, array in inputs.items() if array.dtype.kind == "f"}
    length = max(1.0, sum(float((way**2).sum()) for way in (*along_inputs.values(), *along.values())) ** 0.5 / 10.0)
    along, along_inputs = ({name: way / length for name, way in ways.items()} for ways in (along, along_inputs))

    def loss(step: float) -> float:
        moved = {name: params[name] + step * along[name] for name in params}
        given = {name: inputs[name] + step * way for name, way in along_inputs.items()}
        return float((weights * run(graph, moved, {**inputs, **given})).sum())

    module = to_module(graph, params, dtype=torch.float64).eval()
    given = {name: torch.from_numpy(array).requires_grad_(array.dtype.kind == "f") for name, array in inputs.items()}
    (torch.from_numpy(weights) * module(**given)["y"]).sum().backward()
    untrained = set(params) - {name for name, _ in module.named_parameters()}
    along.update({name: np.zeros_like(along[name]) for name in untrained})
    pairs = [
        *((given[name], way) for name, way in along_inputs.items()),
        *((weight, along[name]) for name, weight in module.named_parameters()),
    ]
    slope = sum(float((tensor.grad.numpy() * way).sum()) for tensor, way in pairs if tensor.grad is not None)
    difference = (loss(STEP) - loss(-STEP)) / (2 * STEP)
    error = abs(slope - difference) / max(abs(slope), abs(difference), 0.1)
    if not error <= SLOPE_ERROR:
        raise CheckFailed("gradients are not the slope", expected=f"{difference:.9g}", found=f"{slope:.9g}")
    return error


def streaming_equals_parallel(subject: Subject) -> float:
    """Token by token from zero states, in numpy and in torch, a causal mixer gives what it gives at once."""
    import torch

    from codegen.torch_backend import to_module

    graph = subject.graph()
    params, x = random_params(graph), random_inputs(graph)["x"]
    stream = verify(subject.step_graph(max_len=subject.case.time + 2))
    if set(stream.parameters) != set(graph.parameters):
        raise CheckFailed(
            "a step has other parameters", expected=str(set(graph.parameters)), found=str(stream.parameters)
        )
    module = to_module(stream, params, dtype=torch.float64).eval()
    state = zero_state(stream)
    outputs: list[Array] = []
    for t in range(subject.case.time):
        given = {"x": x[:, t : t + 1], "position": np.array(t, np.int32), **state}
        state = evaluate(stream, given, params)
        in_module = module(**{name: torch.from_numpy(np.asarray(array)) for name, array in given.items()})
        for name, array in state.items():
            require_close(in_module[name].detach().numpy(), array, ROUNDING_64, f"{name} in torch and numpy")
        outputs.append(state.pop("y"))
    expected = run(graph, params, {"x": x})
    return require_close(np.concatenate(outputs, axis=1), expected, ROUNDING_64, "streaming and parallel")


def streams_at_every_length(subject: Subject) -> None:
    """The state may be as short as the stream itself: one token, and exactly all of them."""
    for max_len in (1, 2, 3, 4, 5):
        short = subject.resized(time=max_len)
        graph, stream = short.graph(), short.step_graph(max_len)
        params, x = random_params(graph), random_inputs(graph)["x"]
        state, last = zero_state(stream), np.zeros(0)
        for t in range(max_len):
            state = evaluate(stream, {"x": x[:, t : t + 1], "position": np.array(t, np.int32), **state}, params)
            last = state.pop("y")
        require_close(last, run(graph, params, {"x": x})[:, -1:], ROUNDING_64, f"streaming of {max_len}")


def grows_as_declared(subject: Subject) -> float:
    """FLOPs at more and more tokens have the declared exponent; projections still weigh a little at these lengths."""
    lengths = (1024, 4096, 16384) if subject.case.grid else (256, 512, 1024)
    flops = [profile(subject.resized(batch=1, time=time).graph()).flops for time in lengths]
    declared = subject.mixer.growth_exponent()
    measured = 0.0
    for (first, shorter), (second, longer) in itertools.pairwise(zip(lengths, flops, strict=True)):
        measured = float(np.log2(longer / shorter) / np.log2(second / first)) if shorter else 0.0
        if abs(measured - declared) > GROWTH_ERROR:
            raise CheckFailed("FLOPs grow otherwise", expected=f"T^{declared:g}", found=f"T^{measured:.3f}")
    return measured


def limit_holds(component: type[Component], limit: Limit) -> float:
    """A component equals the other one that a limit names."""
    mine = Subject(limit.says, component.create(limit.case.options), limit.case)
    graph = mine.graph()
    params, inputs = random_params(graph), random_inputs(graph)
    for name, value in limit.values.items():
        if f"{SCOPE}.{name}" not in params:
            raise CheckFailed("a limit sets a parameter that is not there", where=limit.says, found=name)
        params[f"{SCOPE}.{name}"] = np.full_like(params[f"{SCOPE}.{name}"], value)
    found = run(graph, params, inputs)
    own = {name.removeprefix(f"{SCOPE}."): array for name, array in params.items()}
    other = get(component.kind, limit.other).create(limit.options)
    expected = _other_output(other, limit, limit.adapt(own) if limit.adapt else own, inputs["x"])
    return require_close(found, expected.reshape(found.shape), ROUNDING_64, limit.says)


def _other_output(other: Component, limit: Limit, params: Mapping[str, Array], x: Array) -> Array:
    assert isinstance(other, TokenMixer | ChannelMixer | Norm)
    b = Builder()
    placed = x.reshape(x.shape[0], -1, x.shape[-1]) if not getattr(other, "spatial", False) else x
    graph = b.build(y=other.build(b, b.input("x", placed.shape)))
    values: dict[str, Array] = {}
    for name, node in graph.parameters.items():
        if name not in params:
            raise CheckFailed(f"{limit.other} has a parameter that the limit does not give", found=name)
        values[name] = np.reshape(params[name], node.types[0].shape)
    return run(graph, values, {"x": placed})


def _is_mixer(subject: Subject) -> bool:
    return isinstance(subject.component, TokenMixer)


def _is_causal(subject: Subject) -> bool:
    return isinstance(subject.component, TokenMixer) and subject.component.is_causal


def _is_bidirectional(subject: Subject) -> bool:
    component = subject.component
    return isinstance(component, TokenMixer) and not component.is_causal and component.key() != "identity"


def _has_forms(subject: Subject) -> bool:
    return isinstance(subject.component, TokenMixer) and bool(subject.component.forms)


def _is_tokenwise(subject: Subject) -> bool:
    component = subject.component
    if isinstance(component, ChannelMixer):
        return not component.spatial
    return isinstance(component, Norm) and component.tokenwise


def _always(subject: Subject) -> bool:
    return True


CHECKS: Final = (
    Check("round_trip", _always, round_trips),
    Check("numpy_equals_reference", _always, equals_reference),
    Check("torch_equals_numpy", _always, torch_equals_numpy),
    Check("gradients", _always, gradients_equal_differences),
    Check("batch_independence", _always, keeps_examples_apart),
    Check("tokens_apart", _is_tokenwise, keeps_tokens_apart),
    Check("causal", _is_causal, does_not_look_ahead),
    Check("bidirectional", _is_bidirectional, looks_ahead),
    Check("forms_agree", _has_forms, forms_agree),
    Check("step_equals_parallel", _is_causal, streaming_equals_parallel),
    Check("step_at_every_length", _is_causal, streams_at_every_length),
    Check("growth", _is_mixer, grows_as_declared),
)
"""In the order they are run."""
