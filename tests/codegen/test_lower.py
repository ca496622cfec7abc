"""From a graph to a library with packed weights: what is shared, folded, named, and what the outputs are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from codegen import lower, targets
from codegen.build import BuiltModel, build
from codegen.container import relative_error
from codegen.kernels.gemm import GemmKernel
from codegen.manifest import FORWARD
from codegen.tuning import Record, TuningDatabase
from ir.builder import Builder, Tensor
from ir.errors import CompileError
from ir.graph import Graph
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.types import Axis
from tests.codegen.building import run_graph

TARGET = targets.get("cpu", threads=1)
TOLERANCE = 1e-5  # float32 sums of a few dozen products err by about 1e-6 of the output's scale


def weight(b: Builder, name: str, *sizes: int) -> Tensor:
    """A parameter."""
    return b.parameter(name, tuple((Axis(f"axis{index}", size),) for index, size in enumerate(sizes)), "normal(0.5)")


def run(graph: Graph, tmp_path, seed: int = 0) -> tuple[BuiltModel, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Build a graph, run it, hold it against the interpreter; return what was built, the inputs and the outputs."""
    params = initialize(graph, seed)
    rng = np.random.default_rng(seed)
    inputs = {
        name: rng.standard_normal(node.types[0].shape).astype(np.float32)
        if node.types[0].is_float
        else rng.integers(0, 3, node.types[0].shape).astype(np.int32)
        for name, node in graph.inputs.items()
    }
    built, outputs = run_graph(graph, params, TARGET, tmp_path, inputs)
    expected = evaluate(graph, inputs, params)
    assert list(outputs) == [name for name, _ in graph.outputs]
    for name, array in expected.items():
        assert outputs[name].shape == array.shape
        assert relative_error(outputs[name], array) <= TOLERANCE
    return built, inputs, outputs


def test_equal_kernels_are_generated_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Three layers of one shape share one function, and each has its own weights."""
    generated: list[str] = []
    original = GemmKernel.build

    def counting(kernel, isa, knobs):
        generated.append(kernel.key)
        return original(kernel, isa, knobs)

    monkeypatch.setattr(GemmKernel, "build", counting)
    b = Builder()
    x = b.input("x", (2, 3, 8))
    for layer in range(3):
        with b.scope(f"layers.{layer}"):
            x = b.gelu(b.matmul(x, weight(b, "w", 8, 8)))
    built, *_ = run(b.build(y=x), tmp_path)
    assert generated == ["gemm(m=6,n=8,k=8,activation=gelu)"]
    assert [name.split(".", 1)[1] for name in built.weights] == [f"layers.{layer}.w" for layer in range(3)]
    assert [record["scope"] for record in built.functions[FORWARD].kernels] == [f"layers.{layer}" for layer in range(3)]


def test_weight_used_twice_is_packed_once(tmp_path) -> None:
    """The same parameter in the same layout is stored once, whichever kernels read it."""
    b = Builder()
    x = b.input("x", (2, 3, 8))
    shared = weight(b, "w", 8, 8)
    graph = b.build(y=b.matmul(b.relu(b.matmul(x, shared)), shared), z=b.matmul(b.exp(x), shared))
    built, *_ = run(graph, tmp_path)
    layouts = {record["kernel"] for record in built.functions[FORWARD].kernels if record["family"] == "gemm"}
    assert len(layouts) == 2
    assert list(built.weights) == ["0.w"]
    assert built.functions[FORWARD].memory["weight_bytes"] == built.weights["0.w"].nbytes


def test_tied_embedding_is_packed_twice(tmp_path) -> None:
    """As rows for the lookup, and as tiles of its transpose for the head."""
    b = Builder()
    table = weight(b, "embedding", 11, 8)
    h = b.take(table, b.input("tokens", (2, 3), "int32"))
    built, *_ = run(b.build(y=b.matmul(b.rms_norm(h), table, transpose_b=True)), tmp_path)
    assert [name.split(".", 1)[1] for name in built.weights] == ["embedding", "embedding"]
    rows, tiles = built.weights.values()
    assert rows.shape == (11, 8)
    assert tiles.shape != rows.shape


def test_expression_of_parameters_is_folded(tmp_path) -> None:
    """-exp(A_log) is one array of the artifact, computed in float64 and rounded once."""
    b = Builder()
    a_log = weight(b, "a_log", 8)
    graph = b.build(y=b.input("x", (2, 8)) * -b.exp(a_log))
    built, *_ = run(graph, tmp_path)
    (name,), (array,) = built.weights.keys(), built.weights.values()
    assert name.split(".", 1)[1] == "a_log"
    exact = -np.exp(initialize(graph, 0)["a_log"].astype(np.float64))
    assert np.array_equal(array, exact.astype(np.float32))
    assert [record["kernel"].split(",")[0] for record in built.functions[FORWARD].kernels] == ["fused(mul"]


def test_gated_weights_lie_side_by_side(tmp_path) -> None:
    """The two weights of a gated product are one array, named after both."""
    b = Builder()
    x = b.input("x", (2, 3, 8))
    built, *_ = run(b.build(y=b.silu(b.matmul(x, weight(b, "g", 8, 5))) * b.matmul(x, weight(b, "u", 8, 5))), tmp_path)
    assert [name.split(".", 1)[1] for name in built.weights] == ["u+g"]


OUTPUTS: dict[str, Callable[[Builder, Tensor], dict[str, Tensor]]] = {
    "several": lambda b, x: {"y": (h := b.exp(x)), "z": b.sum(h, 0), "w": b.matmul(h, weight(b, "w", 8, 3))},
    "one_value_twice": lambda b, x: {"y": (h := b.exp(x)), "again": h},
    "a_view_of_another": lambda b, x: {"y": (h := b.exp(x)), "flat": b.reshape(h, 48)},
    "input": lambda b, x: {"y": x},
    "input_beside_a_reader": lambda b, x: {"same": x, "y": b.exp(x)},
    "reshaped_input": lambda b, x: {"flat": b.reshape(x, 48), "same": x},
    "parameter": lambda b, x: {"w": weight(b, "w", 2, 3), "y": b.exp(x)},
    "parameter_alone": lambda b, x: {"w": weight(b, "w", 2, 3)},
    "constant": lambda b, x: {"c": b.constant(np.arange(6).reshape(2, 3) / 7), "y": b.exp(x)},
    "int_constant": lambda b, x: {"c": b.constant(np.arange(6)), "y": b.exp(x)},
    "folded": lambda b, x: {"w": b.reshape(b.exp(weight(b, "w", 2, 3)), 6), "y": b.exp(x)},
    "weight_also_used": lambda b, x: {"w": (w := weight(b, "w", 8, 3)), "y": b.matmul(x, w)},
    "recurrence_and_its_state": lambda b, x: dict(
        zip(("y", "last"), b.outer_scan(*[b.split_heads(x, 2)] * 3), strict=True)
    ),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_any_value_may_be_an_output(case: str, tmp_path) -> None:
    """Results of kernels, views, inputs, parameters and constants, alone and together."""
    b = Builder()
    run(b.build(**OUTPUTS[case](b, b.input("x", (2, 3, 8)))), tmp_path)


def test_unread_input_stays_in_the_signature(tmp_path) -> None:
    """An input that nothing reads is still given, in its place."""
    b = Builder()
    b.input("before", (3,))
    x = b.input("x", (2, 3, 8))
    b.input("after", (2,), "int32")
    run(b.build(y=b.exp(x)), tmp_path)


def test_simplify_reports_every_pass() -> None:
    """`dump` sees the graph after each pass, and what is left needs no more kernels than it must."""
    b = Builder()
    x = b.input("x", (2, 3))
    b.log(x)
    graph = b.build(y=b.exp(x) + b.exp(x) * (b.constant(2.0) * b.constant(0.5)))
    seen: list[str] = []
    simple = lower.simplify(graph, lambda name, after: seen.append(f"{name} {len(after)}"))
    assert [line.split()[0] for line in seen] == [type(step).__name__ for step in lower.PASSES]
    assert len(simple) < len(graph)
    assert sum(node.op.name == "exp" for node in simple.nodes) == 1


def test_tuned_knobs_are_taken_and_marked(tmp_path) -> None:
    """A record of the database replaces the rule; one with knobs that no longer exist does not."""
    b = Builder()
    graph = b.build(y=b.matmul(b.input("x", (64, 32)), weight(b, "w", 32, 48)))
    kernel = GemmKernel(64, 48, 32)
    others = [knobs for knobs in kernel.knob_space(TARGET.isa) if knobs != kernel.knobs(TARGET.isa)]
    database = TuningDatabase(tmp_path)
    for knobs, tuned in ((others[0], True), ({"no such knob": 1}, False)):
        database.add(Record(kernel.key, TARGET.fingerprint, "ok", knobs, 1.0, 2.0))
        lowered = lower.lower(graph, TARGET, database)
        (record,) = lower.describe(lowered)
        assert record["tuned"] is tuned
        assert record["knobs"] == (dict(knobs) if tuned else dict(kernel.knobs(TARGET.isa)))


def test_describe_lists_every_call() -> None:
    """Kernel, family, knobs, flops, scope and nodes of each call, in order."""
    b = Builder()
    x = b.input("x", (2, 3, 8))
    with b.scope("layers.0"):
        h = b.rms_norm(x)
        with b.scope("mixer"):
            y = b.matmul(h, weight(b, "w", 8, 8)) + x
    records = lower.describe(lower.lower(b.build(y=y), TARGET))
    assert [(record["family"], record["scope"]) for record in records] == [
        ("norm", "layers.0"),
        ("gemm", "layers.0.mixer"),
    ]
    assert records[1]["nodes"] == ["layers.0.mixer/matmul_3", "layers.0.mixer/add_4"]
    assert records[1]["flops"] >= 2 * 6 * 8 * 8
    assert all(record["knobs"] and not record["tuned"] for record in records)


def test_kernel_that_cannot_be_generated_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a generator raises becomes a CompileError with the workload's key."""

    def refuse(kernel, isa, knobs):
        raise ValueError("no such tile")

    monkeypatch.setattr(GemmKernel, "build", refuse)
    b = Builder()
    graph = b.build(y=b.matmul(b.input("x", (2, 8)), weight(b, "w", 8, 3)))
    with pytest.raises(CompileError, match="could not be generated") as error:
        build({FORWARD: graph}, initialize(graph, 0), TARGET, TuningDatabase(tmp_path))
    assert (error.value.where, error.value.found) == ("gemm(m=2,n=3,k=8)", "no such tile")
