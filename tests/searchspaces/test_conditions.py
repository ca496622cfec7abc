"""Side inputs: signatures with a condition, the parts that read it, and models that predict noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from codegen import runtime, targets
from codegen.compile import compile_graph
from codegen.inputs import sample_inputs
from codegen.reference import torch_outputs
from codegen.torch_backend import to_module
from ir.cost import profile
from ir.errors import InputError
from ir.graph import Graph
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.types import TensorType
from nas.checks.component import graph_round_trips
from nas.checks.subjects import random_params
from nas.checks.zoo import check_zoo
from nas.supernet.covering import covering_store
from nas.supernet.module import Supernet
from searchspaces.architecture import Architecture
from searchspaces.signature import Condition, Signature
from searchspaces.space import Space, load_space

Array = np.ndarray
BATCH = 3
CONDITION: dict[str, Any] = {"timestep": True, "num_labels": 11}
NOISY: dict[str, Any] = {
    "modality": "image",
    "output": "denoise",
    "image_size": 4,
    "channels": 2,
    "out_channels": 4,
    "condition": CONDITION,
}
CLASSES: dict[str, Any] = {"modality": "image", "output": "class", "image_size": 4, "channels": 2, "num_classes": 3}
ATTENTION = {"softmax_attention": {"num_heads": 2}}


def space_of(
    signature: dict[str, Any] = NOISY, wiring: Any = "ada_ln_zero", mixer: Any = ATTENTION, **model: Any
) -> Space:
    """Two small layers on four patches."""
    settings = {"signature": signature, "d_model": 8, "depth": 2, "norm": "layer_norm", "position": "learned"} | model
    block = {"wiring": wiring, "token_mixer": mixer, "channel_mixer": "mlp"}
    return Space.from_dict({"schema": 1, "name": "conditions", "model": settings, "block": block})


def graph_of(signature: dict[str, Any] = NOISY, **settings: Any) -> Graph:
    """The model of such a space for a batch of three."""
    space = space_of(signature, **settings)
    assert space.signature is not None
    return space.smallest().graph(space.signature, batch=BATCH)


def inputs_of(**changes: Any) -> dict[str, Array]:
    """Three images of noise with their times and labels."""
    image = np.random.default_rng(0).standard_normal((BATCH, 4, 4, 2)).astype(np.float32)
    time, label = np.array([0.0, 250.5, 999.0], np.float32), np.array([3, 0, 10], np.int32)
    return {"image": image, "timestep": time, "label": label, **changes}


def noise(graph: Graph, params: dict[str, Array], **changes: Any) -> Array:
    """What the graph predicts of these images."""
    return evaluate(graph, inputs_of(**changes), params)["noise"]


def opened(graph: Graph) -> dict[str, Array]:
    """Initial values with a head that is not 0, so that one sees what the layers give."""
    rng, params = np.random.default_rng(1), dict(initialize(graph, 0))
    head = {name: rng.standard_normal(array.shape) for name, array in params.items() if name.startswith("head.")}
    return params | head


def test_shapes_of_a_signature_that_denoises():
    """Values for each pixel come out, and the side inputs have one value for each example."""
    signature = Signature(**{**NOISY, "condition": Condition(**CONDITION)})
    assert signature.output_name == "noise"
    assert signature.output_shape(7) == (7, 4, 4, 4)
    assert signature.condition is not None
    assert signature.condition.inputs(7) == {"timestep": TensorType((7,)), "label": TensorType((7,), "int32")}
    assert list(Condition(num_labels=2).inputs(1)) == ["label"]
    assert space_of().signature == signature


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": {}}, "a condition without inputs"),
        ({"condition": {"timestep": False}}, "a condition without inputs"),
        ({"condition": {"num_labels": 0}}, "num_labels"),
        ({"condition": {"num_label": 4}}, "unknown key `num_label`"),
        ({"condition": {"timestep": 1}}, "timestep"),
        ({"out_channels": 0}, "out_channels"),
        ({"num_classes": 5}, "bad num_classes"),
        ({"modality": "series", "image_size": 0}, "unknown output"),
    ],
)
def test_bad_signature_is_refused_with_its_place(changes: dict[str, Any], message: str):
    """Each message names the key."""
    signature = {name: value for name, value in {**NOISY, **changes}.items() if value != 0 or name == "out_channels"}
    with pytest.raises(InputError, match=message) as caught:
        space_of(signature)
    assert "model.signature" in str(caught.value)


def test_condition_is_not_plain_data():
    """In Python it is an object, checked when it is made."""
    with pytest.raises(InputError, match="bad condition"):
        Signature(**NOISY)


def test_a_model_that_may_stream_takes_no_condition():
    """Its step has the inputs of a token alone."""
    with pytest.raises(InputError, match="takes no condition"):
        Signature(modality="tokens", output="next_token", seq_len=4, vocab_size=5, condition=Condition(timestep=True))


@pytest.mark.parametrize("mixer", [ATTENTION, "depthwise_conv2d"])
def test_layers_start_as_the_identity(mixer: Any):
    """With all gates at 0 two layers compute what none do, to the bit, and the condition reaches the head alone."""
    deep, flat = graph_of(mixer=mixer), graph_of(depth=0)
    params = opened(deep)
    assert any(".modulation" in name for name in params)
    found = noise(deep, params)
    assert np.array_equal(found, noise(flat, {name: params[name] for name in flat.parameters}))
    shut = params | {name: np.zeros_like(params[name]) for name in ("head.modulation", "head.modulation_bias")}
    assert np.abs(found).max() > 0.1
    assert np.array_equal(noise(deep, shut), noise(deep, shut, timestep=np.zeros(BATCH), label=np.zeros(BATCH, int)))


@pytest.mark.parametrize(("name", "other"), [("timestep", [0.0, 251.5, 999.0]), ("label", [3, 1, 10])])
def test_an_example_reads_its_own_condition(name: str, other: list[Any]):
    """With open gates another time or label of one example changes that example, and no other one."""
    graph = graph_of(head={"denoiser": {"adaptive": False}})
    params = random_params(graph)
    changed = np.array(other, inputs_of()[name].dtype)
    difference = np.abs(noise(graph, params) - noise(graph, params, **{name: changed})).max(axis=(1, 2, 3))
    assert difference[1] > 1e-3
    assert difference[0] == difference[2] == 0.0


def test_both_branches_of_a_layer_have_gates():
    """Each of the six vectors of a layer changes the output."""
    graph = graph_of(depth=1)
    params = random_params(graph)
    before, bias = noise(graph, params), params["layers.0.modulation_bias"]
    for part in range(6):
        other = bias.copy()
        other[8 * part : 8 * part + 8] += np.linspace(0.5, 1.0, 8)
        assert np.abs(noise(graph, {**params, "layers.0.modulation_bias": other}) - before).max() > 1e-3, part


def test_stages_of_another_width_read_the_same_condition():
    """The condition has the width of the first stage, each layer its own matrix."""
    stages = [{"d_model": 8, "depth": 1}, {"d_model": 12, "depth": 1, "transition": "conv_downsample"}]
    block = {"wiring": "ada_ln_zero", "token_mixer": ATTENTION, "channel_mixer": "none"}
    model = {"signature": {**NOISY, "image_size": 8}, "stem": {"image_patches": {"patch_size": 2}}}
    space = Space.from_dict({"schema": 1, "name": "pyramid", "model": model, "block": block, "stages": stages})
    assert space.signature is not None
    graph = space.smallest().graph(space.signature)
    shapes = {name: node.types[0].shape for name, node in graph.parameters.items() if name.endswith("modulation")}
    assert shapes == {"layers.0.modulation": (8, 24), "layers.1.modulation": (8, 36), "head.modulation": (8, 24)}
    assert graph.type_of(graph.outputs[0][1]).shape == (1, 8, 8, 4)


def test_a_classifier_may_be_told_the_time():
    """A condition goes with other outputs too; the usual head does not read it, the layers do."""
    graph = graph_of({**CLASSES, "condition": {"timestep": True}})
    params, given = random_params(graph), inputs_of()
    before = evaluate(graph, {name: given[name] for name in ("image", "timestep")}, params)["logits"]
    after = evaluate(graph, {"image": given["image"], "timestep": given["timestep"] + 1.0}, params)["logits"]
    assert (np.abs(before - after).max(axis=1) > 1e-4).all()


def test_a_condition_that_no_part_reads_is_refused():
    """Neither the usual wiring nor the usual head of classes reads it."""
    with pytest.raises(InputError, match="no part of the model reads the condition") as caught:
        graph_of({**CLASSES, "condition": CONDITION}, wiring="pre_norm")
    assert caught.value.found == "pre_norm"


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"signature": CLASSES}, "layers.0.wiring"),
        ({"signature": {**NOISY, "condition": None}, "wiring": "pre_norm"}, "head"),
        ({"signature": CLASSES, "wiring": "pre_norm", "conditioner": "embedding_sum"}, "conditioner"),
    ],
)
def test_a_part_without_its_condition_is_refused(settings: dict[str, Any], where: str):
    """The message names the part."""
    signature = {name: value for name, value in settings.pop("signature").items() if value is not None}
    with pytest.raises(InputError, match="needs a condition, which the task does not give") as caught:
        graph_of(signature, **settings)
    assert caught.value.where == where


@pytest.mark.parametrize("macro", ["axial", "tnt"])
def test_macros_without_a_place_for_a_condition_say_so(macro: str):
    """Their layers have other batches than the condition."""
    with pytest.raises(InputError, match=f"the macro {macro} cannot build this model"):
        graph_of(macro=macro)


def test_tokens_that_are_no_patches_are_refused():
    """A class token leaves 5 tokens for 4 patches."""
    with pytest.raises(InputError, match="tokens are not patches"):
        graph_of(stem={"image_patches": {"class_token": True}})


def test_an_architecture_keeps_its_conditioner():
    """It is part of the plain data where the space names one, and absent as before where it does not."""
    named = space_of(conditioner={"embedding_sum": {"frequencies": {"choice": [4, 8]}}})
    assert named.size() == 2
    first, second = named.enumerate()
    assert first.to_dict()["conditioner"] == {"embedding_sum": {"frequencies": 4}}
    assert [Architecture.from_dict(each.to_dict()) for each in (first, second)] == [first, second]
    assert named.signature is not None
    assert first.canonical_hash(named.signature) != second.canonical_hash(named.signature)
    assert "conditioner" not in space_of().smallest().to_dict()
    assert "embedding_sum(frequencies=4)" in str(first)


def test_compiled_model_gives_what_torch_and_numpy_give(tmp_path: Path):
    """At the times and labels at both ends of their ranges; float32 turns of 1000 radians are exact to 1e-4."""
    graph = graph_of()
    graph_round_trips(graph)
    params = {name: array.astype(np.float32) for name, array in random_params(graph).items()}
    compile_graph(graph, params, targets.get("cpu")).save(tmp_path / "noise.nas")
    model, expected = runtime.load(tmp_path / "noise.nas"), noise(graph, params)
    scale = np.abs(expected).max()
    assert np.abs(model(**inputs_of()) - expected).max() < 1e-4 * scale
    assert np.abs(torch_outputs(graph, params, inputs_of())["noise"] - expected).max() < 1e-4 * scale
    with pytest.raises(InputError, match="label"):
        model(**inputs_of(label=np.array([0, 1, 11], np.int32)))


def test_model_with_gates_that_start_at_zero_passes_every_check(tmp_path: Path):
    """Compiled code is compared with gates open: with all at 0 there would be no difference to find."""
    published = {"paper": "A 2030", "url": "https://example.org", "source": "table 1", "note": "nothing is printed"}
    settings = {"signature": NOISY, "d_model": 8, "depth": 1, "norm": "none"}
    block = {"wiring": "ada_ln_zero", "token_mixer": "depthwise_conv2d", "channel_mixer": "mlp"}
    space = {"schema": 1, "name": "small", "published": published, "model": settings, "block": block}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(space))
    report = check_zoo(str(tmp_path / "small.yaml"))
    assert [finding for finding in report.findings if not finding.passed] == []
    figures = {finding.check: finding.figure for finding in report.findings if finding.subject == "model"}
    assert 0 < (figures["compiled_equals_torch"] or 0) < 1e-4
    assert (figures["trains"] or 0) < 0
    assert {"embedding_sum", "ada_ln_zero", "denoiser"} <= {
        finding.subject.split(" ")[0] for finding in report.findings
    }


def test_labels_that_are_drawn_lie_in_their_table():
    """Inputs for verification and timing come from the graph alone."""
    drawn = sample_inputs(graph_of({**NOISY, "condition": {"num_labels": 2}}))
    assert list(drawn) == ["image", "label"]
    assert set(drawn["label"]) <= {0, 1}


def test_a_sliced_model_is_the_extracted_one():
    """A supernet over widths and depths runs conditioned models on parts of its arrays to the bit."""
    space = space_of(
        d_model={"choice": [4, 8]}, depth={"choice": [1, 2]}, wiring={"choice": ["ada_ln_zero", "pre_norm"]}
    )
    signature = space.signature
    assert signature is not None
    store = covering_store(space, signature)
    values = {name: array + np.float32(0.1) for name, array in store.initialize(0).items()}
    supernet = Supernet(store, signature, batch=BATCH, values=values)
    given = {name: torch.from_numpy(array) for name, array in inputs_of().items()}
    for architecture in space.enumerate():
        alone = to_module(architecture.graph(signature, batch=BATCH), supernet.extract(architecture))
        with torch.no_grad():
            assert torch.equal(supernet.subnet(architecture)(**given)["noise"], alone(**given)["noise"])


def test_published_diffusion_transformer_has_its_parameters_at_full_depth():
    """With 12 layers within 1 % of the 199 M in print; the space of the zoo has 2, which are checked sooner."""
    space = load_space("zoo/dit-moe")
    assert space.signature is not None
    assert space.published is not None
    assert space.published.params is not None
    model = space.smallest().model
    [stage] = model.stages
    deep = replace(model, stages=(replace(stage, layers=stage.layers[:1] * 12),))
    params = profile(Architecture(deep).graph(space.signature)).params
    assert abs(params / space.published.params - 1.0) < 0.01


def test_looped_layers_read_the_condition_in_every_turn():
    """Three turns of one layer are three layers of the same weights."""
    looped = graph_of(depth=1, macro={"looped": {"pre": 0, "post": 0, "times": 3}})
    plain = graph_of(depth=3)
    params = random_params(looped)
    copies = {
        name: params[name.replace("layers.1.", "layers.0.").replace("layers.2.", "layers.0.")]
        for name in plain.parameters
    }
    np.testing.assert_allclose(noise(looped, params), noise(plain, copies), rtol=0, atol=1e-12)
