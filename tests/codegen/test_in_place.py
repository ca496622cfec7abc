"""Caches that a step extends where they lie: which are, that states stay as they were, and what a stream saves."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import nas
from codegen import lower, runtime, targets
from codegen.kernels.fused import FusedKernel, UpdateKernel
from codegen.selection.in_place import update_in_place
from codegen.selection.select import select
from codegen.selection.state import KernelCall
from ir.builder import Builder, Tensor
from ir.graph import Graph
from ir.ops.indexing import DynamicUpdate
from ir.ops.shape import Slice
from searchspaces.architecture import Architecture, ComponentConfig, LayerConfig, ModelConfig, StageConfig
from tests.codegen.building import run_graph

ROWS, WIDTH = 7, 5
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12), np.int32)
TOLERANCE = 1e-5  # float32: the same sums in another order


def updates(make: Callable[[Builder, Tensor, Tensor], Sequence[Tensor]], tmp_path: Path | None = None) -> int:
    """How many updates of `make(b, cache, updated)` are written over an input; the outputs are checked if run."""
    b = Builder()
    cache = b.input("cache", (2, ROWS, WIDTH))
    row, position = b.input("row", (2, 1, WIDTH)), b.input("position", (), "int32")
    outputs = make(b, cache, b.dynamic_update(cache, b.exp(row), position, axis=1))
    graph = b.build(**{f"y{index}": output for index, output in enumerate(outputs)})
    if tmp_path is not None:
        check(graph, tmp_path)
    simple = lower.simplify(graph)
    calls = update_in_place(simple, select(simple))
    return sum(isinstance(call.kernel, UpdateKernel) for call in calls)


def check(graph: Graph, tmp_path: Path) -> None:
    """Run at the first and the last position and compare with numpy."""
    rng = np.random.default_rng(0)
    for position in (0, ROWS - 1):
        inputs = {
            "cache": rng.standard_normal((2, ROWS, WIDTH)).astype(np.float32),
            "row": rng.standard_normal((2, 1, WIDTH)).astype(np.float32),
            "position": np.array(position, np.int32),
        }
        expected = inputs["cache"].copy()
        expected[:, position] = np.exp(inputs["row"][:, 0])
        _, outputs = run_graph(graph, {}, targets.get("cpu", threads=1), tmp_path, inputs)
        np.testing.assert_allclose(outputs["y0"], expected, rtol=TOLERANCE)


def test_update_of_an_input_for_the_caller_is_in_place(tmp_path: Path) -> None:
    """The new row alone is written, also where others read the result, or the old cache before."""
    assert updates(lambda _b, _cache, after: [after], tmp_path) == 1
    assert updates(lambda b, _cache, after: [after, b.sum(after, -1)], tmp_path) == 1


def test_cache_that_is_needed_later_is_copied(tmp_path: Path) -> None:
    """A cache that is returned as it was, or read after the update, and an update that stays inside."""
    assert updates(lambda _b, cache, after: [after, cache], tmp_path) == 0
    assert updates(lambda b, cache, after: [after, b.matmul(b.softmax(after), b.transpose(cache, 0, 2, 1))]) == 0
    assert updates(lambda b, _cache, after: [b.softmax(after)]) == 0


def test_only_the_successor_that_is_named_takes_the_place_of_an_input() -> None:
    """As for the state of a stream: an input of another function is its caller's, and may not be written."""
    b = Builder()
    cache, row = b.input("cache", (2, ROWS, WIDTH)), b.input("row", (2, 1, WIDTH))
    after = b.dynamic_update(cache, row, b.input("position", (), "int32"), axis=1)
    graph = lower.simplify(b.build(other=b.sum(after, -1), cache=after))
    for successors, expected in ((None, 1), ({"cache": "cache"}, 1), ({"cache": "other"}, 0), ({}, 0)):
        calls = update_in_place(graph, select(graph), successors)
        assert sum(isinstance(call.kernel, UpdateKernel) for call in calls) == expected


def test_cache_that_the_same_kernel_reads_in_another_shape_is_copied() -> None:
    """Writing rows in place would change what the kernel reads as other rows."""

    def write(b: Builder, cache: Tensor, turned: Tensor) -> Graph:
        rows = b.reshape(b.slice(turned, 0, 0, 1), 2, 1, WIDTH)
        return b.build(y=b.dynamic_update(cache, rows, b.input("position", (), "int32"), axis=1))

    b = Builder()
    cache = b.input("cache", (2, ROWS, WIDTH))
    graph = write(b, cache, b.reshape(cache, ROWS, 2, WIDTH))
    inside = Builder()
    kernel = FusedKernel(write(inside, inside.input("x0", (2, ROWS, WIDTH)), inside.input("x1", (ROWS, 2, WIDTH))))
    nodes = {type(node.op): node for node in graph.nodes}
    update, position = nodes[DynamicUpdate], graph.inputs["position"].results[0]
    turned = graph.node(nodes[Slice].operands[0].node).results[0]
    call = KernelCall(kernel, (update.operands[0], turned, position), update.results, (nodes[Slice].id, update.id))
    (kept,) = update_in_place(graph, [call])
    assert kept is call


def test_update_of_what_a_kernel_made_is_copied() -> None:
    """Only the caller's memory is written over."""
    b = Builder()
    made = b.exp(b.input("x", (1, ROWS, WIDTH)))
    row, position = b.input("row", (1, 1, WIDTH)), b.input("position", (), "int32")
    graph = b.build(y=b.dynamic_update(b.softmax(made), row, position, axis=1))
    assert not any(isinstance(call.kernel, UpdateKernel) for call in update_in_place(graph, select(graph)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_along_any_axis(axis: int, tmp_path: Path) -> None:
    """Updates of several rows, of whole vectors and of the rest."""
    shape, rng = (3, 4, 37), np.random.default_rng(axis)
    part = tuple(2 if place == axis else size for place, size in enumerate(shape))
    b = Builder()
    cache, rows = b.input("cache", shape), b.input("rows", part)
    graph = b.build(y=b.dynamic_update(cache, rows, b.input("position", (), "int32"), axis=axis))
    inputs = {
        "cache": rng.standard_normal(shape).astype(np.float32),
        "rows": rng.standard_normal(part).astype(np.float32),
        "position": np.array(1, np.int32),
    }
    built, outputs = run_graph(graph, {}, targets.get("cpu", threads=1), tmp_path, inputs)
    assert [record["family"] for record in built.functions["forward"].kernels] == ["update"]
    expected = inputs["cache"].copy()
    expected[tuple(slice(1, 3) if place == axis else slice(None) for place in range(3))] = inputs["rows"]
    np.testing.assert_array_equal(outputs["y"], expected)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> runtime.LoadedModel:
    """Attention over a cache, in two sequences at once, with `prefill` of four tokens."""
    layer = LayerConfig(
        ComponentConfig("pre_norm"), ComponentConfig.of("softmax_attention", num_heads=2), ComponentConfig("none")
    )
    model = ModelConfig(
        stages=(StageConfig(16, (layer, layer)),),
        norm=ComponentConfig("rms_norm"),
        position=ComponentConfig("rope"),
        causal=True,
    )
    made = nas.compile(
        Architecture(model), task="char_lm", target="cpu", threads=1, batch=2, seq_len=[4, 12], step=True, prefill=True
    )
    return nas.load(made.save(tmp_path_factory.mktemp("decoder") / "decoder.nas"), threads=1)


def test_stream_agrees_with_forward(decoder: runtime.LoadedModel) -> None:
    """Eight tokens by two prefills, then one by one: what `forward` says of all at once."""
    stream = decoder.stream()
    assert decoder.prefill_lengths == (4, 12)
    found = [np.asarray(stream.feed(TOKENS[:, :8]))]
    found += [np.asarray(stream.step(TOKENS[:, at : at + 1])) for at in range(8, 12)]
    np.testing.assert_allclose(np.concatenate(found, 1), np.asarray(decoder(TOKENS)), atol=1e-4)


def test_stream_copies_no_cache(decoder: runtime.LoadedModel) -> None:
    """The cache after a token lies where the cache before it lay; a state that somebody asked for lies elsewhere."""
    step = decoder.functions["step"]
    stream = decoder.stream()
    stream.step(TOKENS[:, :1])
    caches = [name for name in step.carried if name.endswith((".k", ".v"))]
    assert len(caches) == 4
    before = {name: stream._state.arrays.seen()[name] for name in caches}  # pyright: ignore
    stream.step(TOKENS[:, 1:2])
    after = stream._state.arrays.seen()  # pyright: ignore
    assert all(np.shares_memory(before[name], after[name]) for name in caches)
    shown = stream.state.arrays
    assert not any(np.shares_memory(before[name], shown[name]) for name in caches)


def test_states_stay_as_they_were(decoder: runtime.LoadedModel) -> None:
    """Whoever keeps a state, forks, or runs two streams of one model in turns gets what separate models would give."""
    lone = [np.asarray(decoder.stream().feed(TOKENS[:, order])) for order in ([0, 1, 2], [3, 4, 5])]
    streams = [decoder.stream(), decoder.stream()]
    found: list[list[np.ndarray]] = [[], []]
    for at in range(3):
        for number, stream in enumerate(streams):
            found[number].append(np.asarray(stream.step(TOKENS[:, 3 * number + at : 3 * number + at + 1])))
    for number in range(2):
        np.testing.assert_allclose(np.concatenate(found[number], 1), lone[number], atol=TOLERANCE)

    saved = pickle.loads(pickle.dumps(streams[0].state))
    np.testing.assert_array_equal(
        np.asarray(decoder.step(TOKENS[:, 7:8], state=saved)[0]), np.asarray(streams[0].step(TOKENS[:, 7:8]))
    )

    _, kept = decoder.step(TOKENS[:, :1])
    copies = {name: array.copy() for name, array in kept.arrays.items()}
    one, _ = decoder.step(TOKENS[:, 1:2], state=kept)
    other, _ = decoder.step(TOKENS[:, 2:3], state=kept)
    again, _ = decoder.step(TOKENS[:, 1:2], state=kept)
    assert not np.array_equal(np.asarray(one), np.asarray(other))
    np.testing.assert_array_equal(np.asarray(one), np.asarray(again))
    assert all(np.array_equal(kept.arrays[name], copies[name]) for name in copies)

    stream = decoder.stream()
    stream.step(TOKENS[:, :1])
    fork, state = stream.fork(), stream.state
    stream.step(TOKENS[:, 2:3])
    np.testing.assert_array_equal(np.asarray(fork.step(TOKENS[:, 1:2])), np.asarray(one))
    assert all(np.array_equal(state.arrays[name], copies[name]) for name in copies)


def test_measurements_and_self_tests_leave_streams_alone(decoder: runtime.LoadedModel) -> None:
    """A bare call writes into the buffers at any time, so a stream keeps nothing there."""
    expected = np.asarray(decoder.stream().feed(TOKENS[:, :3]))[:, 2:]
    stream = decoder.stream()
    stream.step(TOKENS[:, :1])
    assert decoder.self_test() <= TOLERANCE
    stream.step(TOKENS[:, 1:2])
    bare = decoder.prepare(function="step")
    bare()
    np.testing.assert_allclose(np.asarray(stream.step(TOKENS[:, 2:3])), expected, atol=TOLERANCE)
    other = decoder.stream()
    other.feed(TOKENS[:, :2])
    bare()
    np.testing.assert_allclose(np.asarray(other.step(TOKENS[:, 2:3])), expected, atol=TOLERANCE)
