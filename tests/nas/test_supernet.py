"""The supernet: where parameters lie, that a slice is the model, how it is trained, kept and audited."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codegen.torch_backend import to_module
from ir.builder import Builder
from ir.component import Case, TokenMixer
from ir.errors import InputError, StorageError
from ir.graph import Graph
from ir.types import Axis, axes_shape
from nas import tasks
from nas.supernet.audit import audit_supernet, draw_anchors, kendall_interval
from nas.supernet.covering import covering_store
from nas.supernet.module import Supernet
from nas.supernet.sandwich import Sandwich, draw_largest
from nas.supernet.store import ParameterStore, declared_slots, homes, slice_array, slice_params
from nas.supernet.train import SupernetTraining, load_supernet, make_supernet, train_supernet
from nas.tasks.base import Task
from nas.training.budget import Budget, TrainOptions
from searchspaces.architecture import Architecture
from searchspaces.registry import default_registry
from searchspaces.space import Space, load_space
from searchspaces.token_mixers.depthwise_conv import DepthwiseConv

MIXERS = default_registry().keys("token_mixer")
OPTIONS = TrainOptions(batch_size=4, learning_rate=3e-3)

RECALL = Space.from_dict(
    {
        "schema": 1,
        "name": "supernet_test",
        "model": {
            "task": "mqar",
            "d_model": {"choice": [8, 16]},
            "depth": {"choice": [1, 2]},
            "position": "none",
            "norm": {"choice": ["rms_norm", "layer_norm"]},
        },
        "block": {
            "token_mixer": {
                "per_layer": True,
                "choice": [
                    {"linear_attention": {"num_heads": {"choice": [1, 2]}}},
                    {"softmax_attention": {"num_heads": {"choice": [1, 2]}}},
                    {"retention": {"num_heads": {"choice": [1, 2]}}},
                    {"depthwise_conv": {"kernel_size": {"choice": [2, 3]}}},
                ],
            },
            "channel_mixer": {"choice": ["none", {"mlp": {"expansion": {"choice": [1.0, 2.0]}}}]},
        },
    }
)


def recall_task() -> Task:
    return tasks.get("mqar", seq_len=16, vocab_size=16, num_pairs=3, validation_sequences=16)


def training(steps: int = 4, **changes: Any) -> SupernetTraining:
    return replace(SupernetTraining(RECALL, recall_task(), steps, 0, OPTIONS, Sandwich()), **changes)


def samples(space: Space, count: int) -> list[Architecture]:
    rng = np.random.default_rng(11)
    return [space.smallest(), space.largest(), *(space.sample(rng) for _ in range(count))]


def run(module: torch.nn.Module, task: Task, batch: int) -> torch.Tensor:
    inputs = task.train_batch(np.random.default_rng(3), batch).inputs
    with torch.no_grad():
        return module(**{name: torch.from_numpy(array) for name, array in inputs.items()})[task.signature.output_name]


def test_slice_takes_the_leading_part_of_every_factor() -> None:
    """Two heads of three of the size 4 cut to 2 are columns 0, 1, 4 and 5, in numpy as in torch."""
    large = ((Axis("d_model", 3),), (Axis("heads", 3), Axis("head_dim", 4)))
    small = ((Axis("d_model", 2),), (Axis("heads", 2), Axis("head_dim", 2)))
    array = np.arange(36, dtype=np.float32).reshape(3, 12)
    expected = array[:2][:, [0, 1, 4, 5]]
    np.testing.assert_array_equal(slice_array(array, large, small), expected)
    np.testing.assert_array_equal(slice_array(torch.from_numpy(array), large, small).numpy(), expected)


@pytest.mark.parametrize(("causal", "small", "large"), [(True, 2, 5), (False, 3, 5), (False, 3, 4), (False, 4, 7)])
def test_a_small_kernel_is_a_large_one_whose_other_taps_are_zero(causal: bool, small: int, large: int) -> None:
    """Taps that a convolution shares with a larger one weigh the same tokens in both."""
    case = Case({}, batch=2, time=9, d_model=4)
    few, many = (
        graph_of(DepthwiseConv.create({"kernel_size": size, "pointwise": False}, {"causal": causal}), case)
        for size in (small, large)
    )

    def home_of(label: str) -> tuple[str, str]:
        return label.rpartition(".")[0], "depthwise_conv"

    declared = [declared_slots(graph, home_of) for graph in (few, many)]
    store = ParameterStore(slot for slots in declared for slot in slots.values())
    values = store.initialize(0)
    parts = slice_params(store, values, few, home_of)
    whole = slice_params(store, values, many, home_of)
    kept = np.zeros_like(whole["mixer.kernel"])
    first = next(
        start for start in range(large) if np.array_equal(whole["mixer.kernel"][start], parts["mixer.kernel"][0])
    )
    kept[first : first + small] = parts["mixer.kernel"]
    x = torch.from_numpy(np.random.default_rng(1).standard_normal(case.input_shape).astype(np.float32))
    outputs = [to_module(few, parts)(x=x)["y"], to_module(many, {**whole, "mixer.kernel": kept})(x=x)["y"]]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)  # sums of at most seven float32 products near one


@pytest.mark.parametrize("name", ["tiny_lm", "lm_mix"])
def test_a_sliced_architecture_computes_exactly_what_the_extracted_one_does(name: str) -> None:
    """Running on views of the shared weights and running a plain model with copies give the same bits."""
    space = load_space(name)
    task = tasks.get("char_lm", seq_len=32)
    store = covering_store(space, task.signature)
    supernet = Supernet(store, task.signature, batch=2, values=store.initialize(0))
    for architecture in samples(space, 6):
        alone = to_module(architecture.graph(task.signature, batch=2), supernet.extract(architecture))
        torch.testing.assert_close(run(supernet.subnet(architecture), task, 2), run(alone, task, 2), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["tiny_lm", "lm_mix", "tiny_recall", "tiny_vision", "vision_mix", "series_mix"])
def test_a_store_has_room_for_every_architecture(name: str) -> None:
    """Parameters of random architectures lie in the store, in the shapes that their graphs declare."""
    space = load_space(name)
    seq_len: dict[str, Any] = {} if space.seq_len is None else {"seq_len": space.seq_len}
    signature = tasks.get(space.task, **seq_len).signature
    store = covering_store(space, signature)
    values = {key: np.broadcast_to(np.float32(0), axes_shape(slot.axes)) for key, slot in store.slots.items()}
    for architecture in samples(space, 20):
        graph = architecture.graph(signature)
        sliced = slice_params(store, values, graph, homes(architecture, signature))
        assert {label: part.shape for label, part in sliced.items()} == {
            label: node.types[0].shape for label, node in graph.parameters.items()
        }


def graph_of(mixer: TokenMixer, case: Case) -> Graph:
    b = Builder()
    with b.scope("mixer"):
        return b.build(y=mixer.build(b, b.input("x", case.input_shape)))


def wider(case: Case, kind: type[TokenMixer]) -> tuple[TokenMixer, Case]:
    """The same mixer at three times the width, or at its own where it cannot be built there."""
    mixer: TokenMixer = kind.create(case.options)
    large = replace(case, d_model=3 * case.d_model)
    return mixer, case if mixer.check(large.d_model) else large


@pytest.mark.parametrize("key", MIXERS)
def test_sliced_parameters_of_a_mixer_have_the_shapes_that_it_declares(key: str) -> None:
    """A mixer's parameters at a small width are leading parts of those at a larger one, and compute the same output."""
    kind = default_registry().get("token_mixer", key)
    assert issubclass(kind, TokenMixer)

    def home_of(label: str) -> tuple[str, str]:
        return label.rpartition(".")[0], key

    for case in kind.cases:
        mixer, large = wider(case, kind)
        small_graph, large_graph = graph_of(mixer, case), graph_of(mixer, large)
        declared = [declared_slots(graph, home_of) for graph in (small_graph, large_graph)]
        store = ParameterStore(slot for slots in declared for slot in slots.values())
        values = store.initialize(0)
        sliced = slice_params(store, values, small_graph, home_of)
        for label, node in small_graph.parameters.items():
            assert sliced[label].shape == node.types[0].shape
            whole, axes = store.find(declared[0][label]).axes, declared[0][label].axes
            assert all(a.name == b.name for f, g in zip(whole, axes, strict=True) for a, b in zip(f, g, strict=True))
        x = torch.from_numpy(np.random.default_rng(0).standard_normal(case.input_shape).astype(np.float32))
        output = to_module(small_graph, sliced)(x=x)["y"]
        assert output.shape == x.shape
        assert bool(output.isfinite().all())


def test_projections_are_shared_among_kinds_and_the_rest_is_not() -> None:
    """Queries of attention and of retention are the same numbers; so are the taps of convolutions of two sizes."""
    store = covering_store(RECALL, recall_task().signature)
    shared = [key for key in store.slots if ".any." in key]
    assert sorted(key.split("[")[0] for key in shared if key.startswith("layers.0")) == [
        f"layers.0.mixer.any.{role}" for role in ("gate", "k", "out", "q", "v")
    ]
    kernels = [key for key in store.slots if key.startswith("layers.0.mixer.depthwise_conv.kernel")]
    assert [axes_shape(store.slots[key].axes)[0] for key in kernels] == [3]


def test_gradients_reach_the_slice_and_nothing_beyond() -> None:
    """After a step of the smallest model, only the leading part of the shared weights has a gradient."""
    supernet = make_supernet(training())
    task, smallest = recall_task(), RECALL.smallest()
    tokens = torch.from_numpy(task.train_batch(np.random.default_rng(0), 4).inputs["tokens"])
    supernet.subnet(smallest)(tokens=tokens)["logits"].square().mean().backward()
    embedding = next(weight for key, weight in supernet.weights.items() if key.startswith("stem"))
    assert embedding.grad is not None
    assert embedding.shape[1] == 16
    assert bool(embedding.grad[:, :8].abs().sum() > 0)
    assert bool((embedding.grad[:, 8:] == 0).all())


def test_a_foreign_architecture_is_refused() -> None:
    """An architecture of another space has parameters that the supernet has no place for."""
    with pytest.raises(InputError, match="no place for a parameter"):
        make_supernet(training()).subnet(load_space("tiny_lm").largest())


def test_a_sandwich_holds_the_largest_and_the_smallest_of_all_kinds() -> None:
    """Sizes are at their ends, kinds vary, and shrinking begins with the large ones alone."""
    rng = np.random.default_rng(0)
    largest = [draw_largest(RECALL, rng) for _ in range(20)]
    assert {(a.model.d_model, a.model.depth) for a in largest} == {(16, 2)}
    assert len({layer.token_mixer.key for a in largest for layer in a.model.layers}) == 4
    _, smallest, *others = Sandwich(random=3).draw(RECALL, rng, 1.0)
    assert (smallest.model.d_model, smallest.model.depth) == (8, 1)
    assert len(others) == 3
    early = Sandwich(random=3, shrink=1.0).draw(RECALL, rng, 0.0)
    assert {(a.model.d_model, a.model.depth) for a in early} == {(16, 2)}


@pytest.mark.parametrize("options", [{"random": -1}, {"distill": 1.5}, {"shrink": -0.1}])
def test_a_bad_sandwich_is_refused(options: dict[str, Any]) -> None:
    """The message names the number."""
    with pytest.raises(InputError, match=next(iter(options))):
        Sandwich(**options)


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_a_bad_number_of_steps_is_refused(steps: Any) -> None:
    """There is at least one step."""
    with pytest.raises(InputError, match="bad number of steps"):
        train_supernet(RECALL, recall_task(), steps, seed=0)


class Killed(Exception):
    """Stands for the end of a process."""


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Weights are the same bits whether or not the process ended on the way; another training is refused."""

    def die(step: int, steps: int, loss: float) -> None:
        if step == 3:
            raise Killed

    task, path = recall_task(), tmp_path / "supernet.safetensors"
    whole = train_supernet(RECALL, task, 5, seed=1, options=OPTIONS)
    with pytest.raises(Killed):
        train_supernet(RECALL, task, 5, seed=1, options=OPTIONS, path=path, save_every=2, progress=die)
    with pytest.raises(InputError, match="interrupted"):
        load_supernet(path, task)
    with pytest.raises(InputError, match="another seed"):
        train_supernet(RECALL, task, 5, seed=2, options=OPTIONS, path=path)
    seen: list[int] = []
    resumed = train_supernet(
        RECALL, task, 5, seed=1, options=OPTIONS, path=path, progress=lambda step, *_: seen.append(step)
    )
    assert seen == [3, 4, 5]
    loaded = load_supernet(path, task)
    for key, array in whole.export().items():
        np.testing.assert_array_equal(resumed.export()[key], array)
        np.testing.assert_array_equal(loaded.export()[key], array)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("data", [b"", b"no safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_file_that_is_no_supernet_is_refused(tmp_path: Path, data: bytes) -> None:
    """The message names the file and what to do."""
    path = tmp_path / "supernet.safetensors"
    path.write_bytes(data)
    with pytest.raises(StorageError, match="not a supernet") as caught:
        load_supernet(path, recall_task())
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_training_lowers_the_loss_of_members_of_the_space(distill: float) -> None:
    """With the task's own loss and with distillation alone, large models learn from their loss."""
    sandwich, task = Sandwich(distill=distill), recall_task()
    chosen = training(60, sandwich=sandwich)
    before = make_supernet(chosen).evaluate(RECALL.largest(), task).loss
    after = train_supernet(RECALL, task, 60, seed=0, options=OPTIONS, sandwich=sandwich)
    assert after.evaluate(RECALL.largest(), task).loss < before - 0.1


def test_statistics_of_batch_norms_are_measured_for_each_architecture() -> None:
    """Scoring leaves the shared statistics alone and does not depend on them."""
    space = Space.from_dict(
        {
            "schema": 1,
            "name": "normed",
            "model": {"task": "digits", "d_model": {"choice": [8, 16]}, "depth": 1, "norm": "batch_norm"},
            "block": {"token_mixer": "pooling", "channel_mixer": "mlp"},
        }
    )
    task = tasks.get("digits")
    chosen = SupernetTraining(space, task, 1, 0, TrainOptions(batch_size=32, learning_rate=1e-3), Sandwich())
    supernet = make_supernet(chosen)
    assert supernet.subnet(space.largest()).has_batch_norm
    first, before = supernet.evaluate(space.largest(), task), supernet.export()
    means = [key for key in supernet.buffers if "mean" in key]
    assert means
    with torch.no_grad():
        for key in means:
            supernet.buffers[key].fill_(5.0)
    assert supernet.evaluate(space.largest(), task).loss == pytest.approx(first.loss, rel=0.05)
    assert all(bool((supernet.buffers[key] == 5.0).all()) for key in means)
    assert all(bool((before[key] == 0.0).all()) for key in means)


def test_kendall_interval_holds_tau_and_knows_agreement_from_noise() -> None:
    """Equal orders give 1, opposite ones -1, and unrelated scores an interval that holds 0."""
    scores = list(np.random.default_rng(0).standard_normal(16))
    assert kendall_interval(scores, scores, seed=0) == (pytest.approx(1.0), (pytest.approx(1.0), pytest.approx(1.0)))
    tau, _ = kendall_interval(scores, [-score for score in scores], seed=0)
    assert tau == pytest.approx(-1.0)
    tau, (low, high) = kendall_interval(scores, list(np.random.default_rng(1).standard_normal(16)), seed=0)
    assert low < tau < high
    assert low < 0 < high
    assert kendall_interval(scores, [1.0] * 16, seed=0)[0] == 0.0


def test_an_audit_compares_shared_weights_with_training_alone() -> None:
    """Scores are those of the supernet and of training; it reads back what it wrote."""
    task = recall_task()
    supernet = make_supernet(training())
    anchors = draw_anchors(RECALL, 3, seed=0)
    assert anchors == draw_anchors(RECALL, 3, seed=0)
    audit = audit_supernet(supernet, task, anchors, Budget(steps=2), seed=0, options=OPTIONS, threshold=1.1)
    assert audit.supernet == tuple(supernet.evaluate(anchor, task).quality for anchor in anchors)
    assert len(audit.alone) == 3
    assert not audit.passes
    assert "below the 1.1" in str(audit)
    heard: list[tuple[float, ...]] = []
    resumed = audit_supernet(
        supernet,
        task,
        anchors,
        Budget(steps=2),
        seed=0,
        options=OPTIONS,
        threshold=1.1,
        known=audit.alone[:2],
        heard=lambda scores: heard.append(tuple(scores)),
    )
    assert resumed == audit
    assert heard == [audit.alone]
    with pytest.raises(InputError, match="too few anchors"):
        audit_supernet(supernet, task, anchors[:2], Budget(steps=2), seed=0, options=OPTIONS)
    with pytest.raises(InputError, match="too few architectures"):
        draw_anchors(RECALL, 3, seed=0, is_excluded=lambda architecture: True)
