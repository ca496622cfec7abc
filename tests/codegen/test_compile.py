"""Compiling whole graphs: verified artifacts, and errors that cost one compile and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings

from codegen import build, reference, runtime, targets
from codegen.artifact import Artifact
from codegen.compile import compile_graph, describe_kernels
from codegen.container import relative_error
from codegen.inputs import index_bounds, sample_inputs
from codegen.reference import TOLERANCE
from codegen.tuning import TuningDatabase
from ir.builder import Builder
from ir.errors import CompileError, GraphError, KernelCrash, KernelTimeout, TargetUnavailable, VerificationError
from ir.graph import Graph
from ir.hashing import canonical_hash
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.ops.elementwise import Cast
from ir.serialize import graph_from_json
from ir.types import Axis
from tests.codegen import faulty_workers
from tests.ir import random_graphs

TARGET = targets.get("cpu", threads=2)


def decoder(batch: int = 2, time: int = 5) -> Graph:
    """A small causal language model: lookup, attention, gated unit, tied head."""
    b = Builder()
    width, vocab = (Axis("d_model", 8),), (Axis("vocab", 11),)
    tokens = b.input("tokens", (batch, time), "int32")
    table = b.parameter("embedding", (vocab, width), "normal(0.5)")
    x = b.take(table, tokens)
    for layer in range(2):
        with b.scope(f"layers.{layer}"):
            h = b.rms_norm(x, b.parameter("scale", (width,), "constant(1)"))
            q, k, v = (b.split_heads(b.linear(h, name, width), 2) for name in "qkv")
            x = x + b.linear(b.merge_heads(b.attention(b.rope(q), b.rope(k), v, causal=True)), "o", width)
            h = b.layer_norm(x)
            hidden = (Axis("hidden", 20),)
            x = x + b.matmul(
                b.silu(b.linear(h, "gate", hidden, bias=True)) * b.linear(h, "up", hidden, bias=True),
                b.parameter("down", (hidden, width)),
            )
    return b.build(logits=b.matmul(x, table, transpose_b=True))


def check(artifact: Artifact) -> None:
    """Assert that an artifact was held against torch."""
    assert artifact.verification_error is not None
    assert artifact.verification_error <= TOLERANCE


def small(scale: float = 1.0) -> tuple[Graph, dict[str, np.ndarray]]:
    """The smallest model with a weight."""
    b = Builder()
    graph = b.build(y=b.exp(b.linear(b.input("x", (3, 8)), "w", (Axis("hidden", 4),)) * scale))
    return graph, initialize(graph, 0)


def test_artifact_computes_what_the_graph_means(tmp_path: Path) -> None:
    """Saved, loaded without torch and called on new inputs, it gives the interpreter's numbers."""
    graph = decoder()
    params = initialize(graph, 0)
    artifact = compile_graph(graph, params, TARGET, metadata={"trial": 7})
    check(artifact)
    model = runtime.load(artifact.save(tmp_path / "model.nas"))
    for seed in (1, 2):
        tokens = sample_inputs(graph, seed)["tokens"]
        expected = evaluate(graph, {"tokens": tokens}, params)["logits"]
        logits = model(tokens)
        assert isinstance(logits, np.ndarray)
        assert relative_error(logits, expected) <= 1e-5  # float32 sums of some dozen products


def test_artifact_describes_itself() -> None:
    """Graph, hash, signature with index bounds, kernels, parameters and metadata are inside."""
    graph = decoder()
    params = initialize(graph, 0)
    artifact = compile_graph(graph, params, TARGET, metadata={"trial": 7})
    again = graph_from_json(artifact.graph_json)
    assert (again.nodes, again.outputs) == (graph.nodes, graph.outputs)
    assert artifact.graph_hash == canonical_hash(graph)
    assert [(spec.name, spec.shape, spec.dtype, spec.below) for spec in artifact.inputs] == [
        ("tokens", (2, 5), "int32", 11)
    ]
    assert [(spec.name, spec.shape) for spec in artifact.outputs] == [("logits", (2, 5, 11))]
    assert artifact.parameters.keys() == params.keys()
    assert artifact.metadata == {"trial": 7}
    assert artifact.threads == 2
    listed = describe_kernels(graph, TARGET)
    assert [record["kernel"] for record in listed] == [record["kernel"] for record in artifact.kernels]
    json.dumps(listed)


def test_output_that_is_an_input_outlives_the_next_call(tmp_path: Path) -> None:
    """The result of one call is not the buffer that the next call's input is written to."""
    b = Builder()
    x = b.input("x", (3, 4))
    artifact = compile_graph(b.build(y=x, flat=b.reshape(x, 12)), {}, TARGET)
    model = runtime.load(artifact.save(tmp_path / "identity.nas"))
    first = model(np.ones((3, 4), np.float32))
    model(np.zeros((3, 4), np.float32))
    assert isinstance(first, dict)
    assert all(np.array_equal(array, np.ones(array.shape)) for array in first.values())


def test_seen_architecture_takes_its_library_and_is_verified_again(tmp_path: Path) -> None:
    """Other weights and names: the same library, other results; and weights that compute NaN are found all the same."""
    graph, params = small()
    b = Builder()
    renamed = b.build(z=b.exp(b.linear(b.input("a", (3, 8)), "v", (Axis("hidden", 4),)) * 1.0))
    first = compile_graph(graph, params, TARGET, tuning_root=tmp_path)
    second = compile_graph(renamed, initialize(renamed, 1), TARGET, tuning_root=tmp_path)
    entries = list(tmp_path.glob("*/libraries/*.so"))
    assert len(entries) == 1
    assert first.library == second.library
    assert entries[0].read_bytes().endswith(first.library)
    for artifact in (first, second):
        check(artifact)
    assert not np.array_equal(first.expected_outputs["y"], second.expected_outputs["z"])
    assert [list(artifact.parameters) for artifact in (first, second)] == [["w"], ["v"]]
    with pytest.raises(VerificationError, match="disagrees"):
        compile_graph(graph, {"w": np.full((8, 4), np.nan, np.float32)}, TARGET, tuning_root=tmp_path)


@settings(max_examples=25, phases=(Phase.explicit, Phase.generate))  # shrinking would compile hundreds more
@given(
    graph=random_graphs.graphs(
        # Rounding to half precision next to exact numbers has no stable answer.
        recipes=[recipe for op, recipe in random_graphs.RECIPES.items() if op is not Cast]
    )
)
def test_random_graph_compiles(graph: Graph) -> None:
    """Any graph of any operations compiles, and the result agrees with torch."""
    inputs, params = sample_inputs(graph), random_graphs.draw_values(graph)[1]
    assume(all(np.isfinite(array).all() for array in random_graphs.run(graph, inputs, params).values()))
    single = {name: array.astype(np.float32) for name, array in params.items()}
    check(compile_graph(graph, single, TARGET))


def test_lower_instruction_set_runs_here(tmp_path: Path) -> None:
    """An artifact for a lower level of the instruction set runs on this machine too."""
    try:
        target = targets.get("cpu:avx2", threads=2)
    except TargetUnavailable as error:
        pytest.skip(str(error))
    graph = decoder()
    artifact = compile_graph(graph, initialize(graph, 0), target)
    model = runtime.load(artifact.save(tmp_path / "model.nas"))
    assert model.self_test() <= TOLERANCE
    assert artifact.target["isa"] == "avx2"


def test_nan_in_weights_is_found() -> None:
    """A model that computes NaN is refused, though torch computes NaN as well."""
    graph, params = small()
    params["w"][3, 2] = np.nan
    with pytest.raises(VerificationError) as error:
        compile_graph(graph, params, TARGET)
    assert error.value.where == "output y"
    assert error.value.found == "values that are not finite"


@pytest.mark.parametrize("blurred", [(torch.float32,), (torch.float32, torch.float64)])
def test_float64_decides_where_torch_rounds_too_much(
    blurred: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 result of torch that is off by more than is allowed does no harm; a float64 one does."""
    graph, params = small()
    exact = reference.torch_outputs

    def blur(graph: Graph, params: Any, inputs: Any, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
        return {
            name: array * (1.01 if dtype in blurred else 1.0)
            for name, array in exact(graph, params, inputs, dtype).items()
        }

    monkeypatch.setattr(reference, "torch_outputs", blur)
    if torch.float64 in blurred:
        with pytest.raises(VerificationError, match="disagrees"):
            compile_graph(graph, params, TARGET)
    else:
        error = compile_graph(graph, params, TARGET).verification_error
        assert error is not None and error < 1e-5


def test_overflow_is_found() -> None:
    """A model that overflows is refused."""
    graph, params = small(scale=1e4)
    with pytest.raises(VerificationError, match="disagrees"):
        compile_graph(graph, params, TARGET)


def test_model_that_rounds_too_much_gets_plain_products() -> None:
    """Rows a millionfold apart lose their digits to Strassen's algorithm, not to plain products."""
    b = Builder()
    x = b.input("x", (256, 512))
    sizes = np.where(np.random.default_rng(0).random((256, 1)) < 0.5, 1e6, 1.0)
    weight = b.parameter("w", ((Axis("a", 512),), (Axis("b", 512),)))
    graph = b.build(y=b.layer_norm(b.matmul(x * b.constant(sizes), weight)))
    assert any(kernel["knobs"].get("strassen") for kernel in describe_kernels(graph, TARGET))
    artifact = compile_graph(graph, initialize(graph, 0), TARGET)
    check(artifact)
    assert not any(kernel["knobs"].get("strassen") for kernel in artifact.kernels)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (faulty_workers.crash, KernelCrash),
        (faulty_workers.stumble, CompileError),
        (faulty_workers.wrong_result, VerificationError),
        (faulty_workers.one_nan, VerificationError),
    ],
)
def test_bad_code_costs_one_compile(fault, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that crashes or computes something else is an error; the next compile works."""
    graph, params = small()
    with monkeypatch.context() as patch:
        patch.setattr(build, "build_and_run", fault)
        with pytest.raises(expected):
            compile_graph(graph, params, TARGET)
    check(compile_graph(graph, params, TARGET))


def test_code_that_hangs_costs_one_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that never ends is stopped at the limit; the next compile works."""
    graph, params = small()
    compile_graph(graph, params, TARGET)  # so that the limit is on the call alone
    with monkeypatch.context() as patch:
        patch.setattr(build, "build_and_run", faulty_workers.hang)
        patch.setattr("codegen.compile.TIMEOUT_S", 0.5)
        with pytest.raises(KernelTimeout):
            compile_graph(graph, params, TARGET)
    check(compile_graph(graph, params, TARGET))


def test_component_node_is_refused() -> None:
    """A graph with a component left in it is refused before anything is built."""
    b = Builder()
    x = b.input("x", (1, 2, 3))
    with b.scope("layers.0"):
        graph = b.build(y=b.component("token_mixer", "identity", (), x))
    for refuse in (lambda: compile_graph(graph, {}, TARGET), lambda: describe_kernels(graph, TARGET)):
        with pytest.raises(CompileError, match="component node is left") as error:
            refuse()
        assert error.value.where == "layers.0/component_1"
        assert "expand_components" in str(error.value)


def test_bad_arguments_are_refused() -> None:
    """An unknown level, a missing parameter, and an operation that no kernel serves."""
    graph, params = small()
    with pytest.raises(CompileError, match="unknown optimisation level") as error:
        compile_graph(graph, params, TARGET, opt_level=2)
    assert (error.value.expected, error.value.found) == ("1 or 3", "2")
    with pytest.raises(GraphError, match="missing"):
        compile_graph(graph, {}, TARGET)
    b = Builder()
    unserved = b.build(y=b.matmul(b.input("x", (2, 3, 4, 5)), b.input("w", (3, 5, 6))))
    with pytest.raises(CompileError, match="equal leading axes"):
        compile_graph(unserved, {}, TARGET)


def test_sample_inputs_fit_the_graph() -> None:
    """Indices stay inside every table that they reach, positions inside their buffer, and dtypes are the graph's."""
    b = Builder()
    tokens = b.input("tokens", (50, 40), "int32")
    position = b.input("position", (), "int32")
    mask, cache = b.input("mask", (3, 4), "bool"), b.input("cache", (2, 7, 3))
    wide, narrow = b.constant(np.zeros((9, 2))), b.constant(np.zeros((5, 2)))
    written = b.dynamic_update(cache, b.constant(np.ones((2, 3, 3))), position, -2)
    graph = b.build(
        a=b.take(wide, b.reshape(tokens, 2000)), b=b.take(narrow, tokens), c=written, d=b.cast(mask, "float32")
    )
    assert index_bounds(graph) == {"tokens": 5, "position": 5}
    inputs = sample_inputs(graph)
    assert {name: array.dtype.name for name, array in inputs.items()} == {
        "tokens": "int32",
        "position": "int32",
        "mask": "bool",
        "cache": "float32",
    }
    assert (inputs["tokens"].min(), inputs["tokens"].max()) == (0, 4)
    assert inputs["mask"].any() and not inputs["mask"].all()
    assert compile_graph(graph, {}, TARGET).verification_error == 0


def test_level_3_tunes_once(tmp_path: Path) -> None:
    """The first compile fills the database, the second measures nothing and takes what is there."""
    graph, params = small()
    first: list[int] = []
    second: list[int] = []
    compile_graph(
        graph,
        params,
        TARGET,
        opt_level=3,
        tuning_trials=4,
        tuning_root=tmp_path,
        progress=lambda done, *_: first.append(done),
    )
    database = TuningDatabase.for_target(TARGET, tmp_path)
    assert first
    assert len(database) == 2
    records = database.path.read_bytes()
    artifact = compile_graph(
        graph,
        params,
        TARGET,
        opt_level=3,
        tuning_trials=4,
        tuning_root=tmp_path,
        progress=lambda done, *_: second.append(done),
    )
    assert not second
    assert database.path.read_bytes() == records
    assert all(record["tuned"] for record in artifact.kernels)
    at_level_1 = compile_graph(graph, params, TARGET, tuning_root=tmp_path)
    assert [record["knobs"] for record in at_level_1.kernels] == [record["knobs"] for record in artifact.kernels]
    untouched = compile_graph(graph, params, TARGET, tuning_root=tmp_path / "empty")
    assert not any(record["tuned"] for record in untouched.kernels)
