"""The plan of the memory between kernels: who shares, who must not, and what it takes beside the cost model's peak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from codegen import artifact, lower, runtime, targets
from codegen.compile import compile_graph
from codegen.memory import MemoryPlan, plan_memory
from codegen.selection.select import aliases, select
from codegen.selection.state import KernelCall
from ir.builder import Builder, Tensor
from ir.cost import peak_activation_bytes
from ir.graph import Graph, Value
from ir.initializers import initialize
from nas import suites
from tests.codegen.test_select import decoder_layer, weight

X = (2, 3, 8)
ROWS_BYTES = 2 * 3 * 4  # of one column of a value


def planned(make: Callable[[Builder, Tensor], Tensor | tuple[Tensor, ...]]) -> MemoryPlan:
    """The plan of `make(b, x)`."""
    graph = built(make)
    return plan_memory(graph, select(graph))


def built(make: Callable[[Builder, Tensor], Tensor | tuple[Tensor, ...]]) -> Graph:
    """The graph of `make(b, x)`."""
    b = Builder()
    made = make(b, b.input("x", X))
    outputs = made if isinstance(made, tuple) else (made,)
    return b.build(**{f"y{index}": output for index, output in enumerate(outputs)})


def layers(b: Builder, x: Tensor, *widths: int) -> Tensor:
    """Products one after the other."""
    for index, width in enumerate(widths):
        x = b.matmul(x, weight(b, f"w{index}", x.shape[-1], width))
    return x


def test_chain_alternates_between_two_storages() -> None:
    """Each product reads one storage and writes the other; the last writes the output."""
    plan = planned(lambda b, x: layers(b, x, 16, 8, 16, 8, 16, 8))
    assert plan.storages == (16 * ROWS_BYTES, 8 * ROWS_BYTES)
    assert list(plan.places.values()) == [0, 0, 0, 1, 1]
    assert plan.output_bytes == 8 * ROWS_BYTES
    assert plan.activation_bytes == 32 * ROWS_BYTES
    assert plan.peak_bytes == 24 * ROWS_BYTES


def test_value_read_again_later_keeps_its_storage() -> None:
    """A residual lies apart from everything between its two readers, also under another shape."""

    def block(b: Builder, x: Tensor) -> Tensor:
        h = b.matmul(x, weight(b, "in", 8, 8))
        return b.gelu(layers(b, h, 8, 8, 8)) * b.reshape(b.transpose(b.reshape(h, 6, 8), 1, 0), *X)

    graph = built(block)
    calls = select(graph)
    plan = plan_memory(graph, calls)
    assert every_value_keeps_its_memory(graph, calls, plan)
    residual = calls[0].results[0]
    assert [value for value, place in plan.places.items() if place == plan.places[residual]] == [residual]


def test_outputs_and_inputs_are_not_planned() -> None:
    """The caller keeps outputs, also those that a kernel reads, and brings inputs."""
    plan = planned(lambda b, x: ((h := layers(b, x, 8, 8)), b.softmax(b.exp(h))))
    assert plan.output_bytes == 16 * ROWS_BYTES
    assert plan.storages == (8 * ROWS_BYTES,)


def every_value_keeps_its_memory(graph: Graph, calls: list[KernelCall], plan: MemoryPlan) -> bool:
    """Whether no kernel writes into memory that it or a later one still reads, and all of it fits."""
    alias = aliases(graph, calls)
    holder: dict[int, Value] = {}
    for call in calls:
        for value, kind in zip(call.results, call.kernel.outputs, strict=True):
            if value in plan.places:
                holder[plan.places[value]] = value
                if kind.size_bytes > plan.storages[plan.places[value]]:
                    return False
        operands = [alias.get(operand, operand) for operand in call.operands if isinstance(operand, Value)]
        if any(holder[plan.places[value]] != value for value in operands if value in plan.places):
            return False
        places = [plan.places[value] for value in (*set(operands), *call.results) if value in plan.places]
        if len(places) != len(set(places)):
            return False
    return True


MODELS = {model.name: model for model in suites.load("cpu") if "t2048" not in model.name and "bf16" not in model.name}


@pytest.mark.parametrize("name", MODELS)
def test_plan_stays_near_the_cost_model(name: str) -> None:
    """Kernels need no more than single operations do, but for two things, which cost at most three tenths.

    A storage has one value at a time, so a small one may leave most of it empty; and of products that were merged, all
    live as long as the last.
    """
    graph = MODELS[name].build()
    simple = lower.simplify(graph)
    calls = select(simple)
    plan = plan_memory(simple, calls)
    assert every_value_keeps_its_memory(simple, calls, plan)
    assert plan.peak_bytes <= plan.activation_bytes <= 1.3 * peak_activation_bytes(graph)


def test_artifact_records_its_memory_and_results_outlive_the_next_call(tmp_path: Path) -> None:
    """The manifest holds the bytes of the plan; a second call does not write into what the first returned."""
    graph = built(decoder_layer)
    compiled = compile_graph(graph, initialize(graph, 0), targets.get("cpu", threads=1))
    path = compiled.save(tmp_path / "layer.nas")
    simple = lower.simplify(graph)
    assert artifact.read(path).memory == plan_memory(simple, select(simple)).describe(compiled.weights)
    assert compiled.memory["weight_bytes"] >= sum(array.nbytes for array in compiled.parameters.values())
    model = runtime.load(path, threads=1)
    x = np.random.default_rng(0).standard_normal(X).astype(np.float32)
    first = model(x)
    assert isinstance(first, np.ndarray)
    kept = first.copy()
    model(np.zeros_like(x))
    assert np.array_equal(first, kept)
