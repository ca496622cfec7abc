"""From a graph to an ONNX file: names, types, what it says of itself, how it is verified and written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from codegen import formats
from codegen.formats import onnx as onnx_format
from codegen.onnx_export import export as export_module
from codegen.onnx_export import table
from codegen.onnx_export.export import carried, output_names, to_onnx
from codegen.onnx_export.verification import runner
from ir.builder import Builder
from ir.errors import CompileError, GraphError, InputError, StorageError, VerificationError
from ir.graph import Graph
from ir.hashing import canonical_hash
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.ops.elementwise import Exp
from nas.checks.subjects import Subject, random_inputs, random_params, subjects, zero_state
from tests.codegen.onnx_cases import TOLERANCE, check_onnx, in_runtime, needs_runtime
from tests.codegen.test_lower import OUTPUTS, weight
from tests.codegen.test_torch_backend import draw, linear_model

KINDS = ("token_mixer", "channel_mixer", "norm", "reducer", "transition", "stem", "head", "block")
CASES = subjects(*KINDS)
FIRST = list({type(case.component): case for case in reversed(CASES)}.values())


def exponential() -> Graph:
    """y = exp(x)."""
    b = Builder()
    return b.build(y=b.exp(b.input("x", (2, 3))))


def memory(steps: int, *, as_step: bool = False) -> Graph:
    """Linear attention over some tokens, or of one token with the state before and after it."""
    b = Builder()
    x = b.input("x", (1, 1 if as_step else steps, 8))
    q, k, v = (b.split_heads(b.matmul(x, weight(b, name, 8, 8)), 2) for name in ("q", "k", "v"))
    state = b.input("state.memory", (1, 2, 4, 4)) if as_step else None
    y, last = b.outer_scan(q, k, v, state=state)
    merged = b.merge_heads(y)
    return b.build(**{"y": merged, "state.memory": last} if as_step else {"y": merged})


def test_file_says_what_it_is() -> None:
    """Operator set, producer, canonical hash and signature stand in the model."""
    graph = linear_model()
    model = to_onnx(graph, initialize(graph, 0), {"trial": 7})
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.producer_name == "nas"
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["nas.graph_hash"] == canonical_hash(graph)
    assert json.loads(properties["nas.signature"]) == {
        "inputs": [{"name": "x", "shape": [2, 5, 8], "dtype": "float32"}],
        "outputs": [{"name": "y", "shape": [2, 5, 8], "dtype": "float32"}],
        "carried": {},
    }
    assert json.loads(properties["nas.metadata"]) == {"trial": 7}


def test_initializers_have_the_names_of_parameters() -> None:
    """Each parameter stands there under its name with its values, in the layout that the graph gives it."""
    graph = linear_model()
    params = initialize(graph, 0)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in to_onnx(graph, params).graph.initializer}
    for name, array in params.items():
        np.testing.assert_array_equal(held[name], array)


def test_equal_models_are_equal_bytes() -> None:
    """The same graph and parameters give the same file."""
    graph = linear_model()
    first, second = (to_onnx(graph, initialize(graph, 0)).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_equal_constants_are_held_once() -> None:
    """Two layers share the mask and the tables of their rotary positions."""
    graph = linear_model()
    model = to_onnx(graph, initialize(graph, 0))
    sizes = [tuple(tensor.dims) for tensor in model.graph.initializer]
    assert sizes.count((5, 5)) == 1
    assert sizes.count((5, 1, 2)) == 2  # cosines and sines


@needs_runtime
@pytest.mark.parametrize("case", OUTPUTS)
def test_any_value_may_be_an_output(case: str) -> None:
    """Results, views, inputs, parameters and constants, alone and together."""
    b = Builder()
    x = b.input("x", (2, 3, 8))
    graph = b.build(**OUTPUTS[case](b, x))
    check_onnx(graph, draw(graph))


def test_unread_inputs_stay_and_dead_nodes_go() -> None:
    """The signature is the graph's; what no output needs is not written."""
    b = Builder()
    x = b.input("x", (2, 3))
    b.input("unused", (3,), "int32")
    b.log(x)
    weight(b, "dead", 4, 4)
    graph = b.build(y=b.exp(x))
    model = to_onnx(graph, initialize(graph, 0))
    assert [value.name for value in model.graph.input] == ["x", "unused"]
    assert [node.op_type for node in model.graph.node] == ["Exp", "Identity"]
    assert not model.graph.initializer


@needs_runtime
def test_states_go_in_and_come_out() -> None:
    """An output that is called as an input gets another name, and streaming gives what all tokens at once give."""
    whole, step = memory(6), memory(6, as_step=True)
    params = initialize(whole, 0)
    assert carried(step) == ["state.memory"]
    assert output_names(step) == {"y": "y", "state.memory": "state.memory.next"}
    x = np.random.default_rng(0).standard_normal((1, 6, 8)).astype(np.float32)
    run, state = runner(to_onnx(step, params).SerializeToString()), np.zeros((1, 2, 4, 4), np.float32)
    found = []
    for t in range(6):
        outputs = run({"x": x[:, t : t + 1], "state.memory": state})
        state = outputs["state.memory.next"]
        found.append(outputs["y"])
    np.testing.assert_allclose(np.concatenate(found, 1), evaluate(whole, {"x": x}, params)["y"], atol=TOLERANCE)


def test_recurrence_is_one_scan_however_long() -> None:
    """The file does not grow with the number of steps, and one step needs no loop."""
    sizes = [len(to_onnx(memory(steps), initialize(memory(steps), 0)).SerializeToString()) for steps in (2, 512)]
    assert sizes[1] - sizes[0] < 100
    graph = memory(1)
    assert "Scan" not in [node.op_type for node in to_onnx(graph, initialize(graph, 0)).graph.node]


def component_equals_numpy(case: Subject) -> None:
    """A component gives in ONNX Runtime what its operations mean; its step does too, from a state that is not zero."""
    graph = case.graph()
    params = random_params(graph)
    functions = [(graph, random_inputs(graph))]
    if case.component.kind == "token_mixer" and case.mixer.is_causal:
        step = case.step_graph(max_len=case.case.time + 2)
        start = {"x": random_inputs(graph)["x"][:, :1], "position": np.array(0, np.int32), **zero_state(step)}
        after = evaluate(step, start, params)
        functions.append((step, {**after, "x": 0.5 * start["x"], "position": np.array(1, np.int32)}))
    for function, inputs in functions:
        given = {name: inputs[name] for name in function.inputs}
        found = in_runtime(function, params, given)
        for name, expected in evaluate(function, given, params).items():
            # float32 sums of up to a thousand products, and the small denominators of normalised memories
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-4 * max(np.abs(expected).max(), 1e-30))


@needs_runtime
@pytest.mark.parametrize("kind", KINDS)
def test_component_equals_numpy(kind: str) -> None:
    """The first case of each component."""
    for case in FIRST:
        if case.component.kind == kind:
            component_equals_numpy(case)


@needs_runtime
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_component_equals_numpy_in_every_case(case: Subject) -> None:
    """Every case that a component declares."""
    component_equals_numpy(case)


def test_component_node_and_missing_parameter_are_named() -> None:
    """What cannot be written is refused with its place."""
    b = Builder()
    component = b.build(y=b.component("token_mixer", "identity", (), b.input("x", (1, 2, 3))))
    with pytest.raises(GraphError, match="no ONNX row") as error:
        to_onnx(component, {})
    assert "expand" in str(error.value)
    with pytest.raises(GraphError, match="missing") as error:
        to_onnx(linear_model(), {})
    assert error.value.where == "layers.0.mixer.w"


def test_model_too_large_for_one_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gigabytes are the limit of the format, and the error says so before any work."""
    graph = linear_model()
    monkeypatch.setattr(export_module, "LIMIT_BYTES", 500)
    with pytest.raises(CompileError, match="one ONNX file") as error:
        to_onnx(graph, {})
    assert "nas format" in (error.value.hint or "")


@needs_runtime
def test_wrong_model_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row that computes something else is found before the file is there; an old file stays."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    wrong = {**table.ONNX, Exp: lambda e, site, x: e("Abs", x)}
    monkeypatch.setattr(export_module, "ONNX", wrong)
    with pytest.raises(VerificationError, match="disagrees with torch") as error:
        onnx_format.export(exponential(), {}, path)
    assert error.value.where == "output y"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_checker_refuses_a_row_of_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types that ONNX infers must be those of the graph."""
    monkeypatch.setattr(export_module, "ONNX", {**table.ONNX, Exp: lambda e, site, x: e("Shape", x)})
    with pytest.raises(VerificationError, match="checker"):
        to_onnx(exponential(), {})


def test_without_a_runtime_the_file_says_that_it_was_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is checked and written all the same."""
    monkeypatch.setattr(onnx_format, "is_runnable", lambda: False)
    exported = onnx_format.export(exponential(), {}, tmp_path / "model.onnx")
    assert exported.verification_error is None
    assert exported.unverified == "ONNX Runtime is not installed"
    onnx.checker.check_model(str(exported.path), full_check=True)


@needs_runtime
def test_step_stands_beside_the_model(tmp_path: Path) -> None:
    """Both functions are verified, and both files are named."""
    graph = memory(6)
    params = initialize(graph, 0)
    exported = onnx_format.export(graph, params, tmp_path / "model.onnx", step=memory(6, as_step=True))
    assert [file.name for file in exported.files] == ["model.onnx", "model.step.onnx"]
    assert exported.size_bytes == sum(file.stat().st_size for file in exported.files)
    assert exported.verification_error is not None
    assert exported.verification_error <= TOLERANCE


def test_unwritable_place_is_a_storage_error(tmp_path: Path) -> None:
    """The path is named, and nothing is left behind."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as error:
        onnx_format.export(exponential(), {}, tmp_path / "file" / "model.onnx")
    assert "model.onnx" in (error.value.where or "")


def test_formats_are_found_by_listing() -> None:
    """A format is a file; an unknown one is answered with the nearest."""
    assert {"nas", "onnx"} <= set(formats.available())
    assert formats.get("onnx").SUFFIX == ".onnx"
    with pytest.raises(InputError, match="did you mean 'onnx'"):
        formats.get("onxx")
