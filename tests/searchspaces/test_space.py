"""Search spaces: counting, drawing, varying, and the architectures that come out."""

import itertools
import json
import pickle
from collections import Counter

import numpy as np
import pytest

from ir.errors import InputError, SpaceError
from searchspaces.architecture import Architecture, ComponentConfig
from searchspaces.domains import Axis
from searchspaces.signature import Signature
from searchspaces.space import ZOO, Constraint, Space, load_space, shipped_spaces
from tests.searchspaces import fakes

ATTENTION = {"softmax_attention": {"num_heads": {"choice": [3, 4]}}}
GLA = {"gla": {"expand_k": {"choice": [0.5, 1.0]}}}


def _space(*, mixers=(ATTENTION, GLA, "pooling"), channel=("mlp", "none"), model=None, **sections) -> Space:
    data = {
        "schema": 1,
        "name": "test",
        "model": {"task": "char_lm", "d_model": {"choice": [48, 64]}, "depth": {"range": [1, 3, 1]}, **(model or {})},
        "block": {
            "token_mixer": {"per_layer": True, "choice": list(mixers)},
            "channel_mixer": {"choice": list(channel)},
        },
        **sections,
    }
    return Space.from_dict(data, fakes.registry())


SPACES = {
    "plain": _space(),
    "no heads constraint": _space(mixers=(GLA, "pooling")),
    "required": _space(constraints={"at_least_one_of": ["gla"]}),
    "required in a channel mixer": _space(constraints={"at_least_one_of": ["softmax_attention", "mlp"]}),
    "rope": _space(
        mixers=({"softmax_attention": {"num_heads": {"choice": [4, 16]}}}, "pooling"),
        model={"position": {"choice": ["none", "rope"]}, "norm": {"choice": ["rms_norm", "layer_norm"]}},
    ),
    "aliases": _space(mixers=("gla",), channel=({"swiglu": {"expansion": {"range": [1.0, 2.0, 0.5]}}}, "geglu")),
    "ordered": _space(
        mixers=("pooling", "softmax_attention", "gla"),
        channel=("none",),
        model={"d_model": 64, "depth": {"range": [1, 4, 1]}},
        constraints={"order": [["pooling"], ["softmax_attention"]]},
    ),
    "ordered and required": _space(
        mixers=("pooling", "softmax_attention", "gla"),
        model={"d_model": 64},
        constraints={"order": [["pooling"], ["gla", "softmax_attention"]], "at_least_one_of": ["gla"]},
    ),
    "one architecture": _space(mixers=("pooling",), channel=("none",), model={"d_model": 64, "depth": 2}),
}

TURNS = [{"choice": ["pooling", "softmax_attention"]}, "softmax_attention"]

SIGNATURES = {
    "char_lm": Signature(modality="tokens", output="next_token", seq_len=32, vocab_size=50),
    "mqar": Signature(modality="tokens", output="next_token", seq_len=32, vocab_size=50),
    "digits": Signature(modality="image", output="class", image_size=8, channels=1, num_classes=10),
    "forecast": Signature(modality="series", output="forecast", seq_len=96, variates=5, horizon=24),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_size_counts_what_enumerate_gives(space):
    """The closed form equals the number of architectures, all different and all in the space."""
    every = list(space.enumerate())
    assert space.size() == len(every) == len(set(every))
    assert all(space.is_valid(architecture) is None for architecture in every)


def test_size_is_exact_beyond_machine_integers():
    """Sizes are Python integers: 2 mixers in each of up to 200 layers."""
    space = _space(
        mixers=("gla", "pooling"), channel=("none",), model={"d_model": 64, "depth": {"range": [199, 200, 1]}}
    )
    assert space.size() == 2**199 + 2**200


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_sample_stays_in_the_space_and_reaches_all_of_it(space):
    """Draws are valid, and 40 draws for each architecture of a small space leave few out."""
    rng = np.random.default_rng(0)
    drawn = {space.sample(rng) for _ in range(2000)}
    assert all(space.is_valid(architecture) is None for architecture in drawn)
    if space.size() <= 50:
        assert len(drawn) == space.size()


def test_sample_is_uniform_on_each_axis():
    """Each value of an unconstrained axis comes up equally often, whatever hangs below it."""
    space = _space(mixers=(GLA, "pooling"))
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng).model for _ in range(3000)]
    depths = Counter(model.depth for model in drawn)
    mixers = Counter(model.layers[0].token_mixer.key for model in drawn)
    assert all(
        abs(depths[depth] / 3000 - 1 / 3) < 0.035 for depth in (1, 2, 3)
    )  # 4 standard deviations: 4 sqrt(2/9/3000)
    assert abs(mixers["pooling"] / 3000 - 1 / 2) < 0.037  # 4 sqrt(1/4/3000)


def test_sample_is_a_function_of_the_seed():
    """The same generator state gives the same architectures."""
    space = SPACES["plain"]
    first, second = (
        [space.sample(rng) for _ in range(20)] for rng in (np.random.default_rng(7), np.random.default_rng(7))
    )
    assert first == second


def test_sample_finds_valid_deep_models():
    """A component that does not fit is drawn again on its own: depth does not multiply the rejections."""
    attention = {"softmax_attention": {"num_heads": {"choice": [3, 5, 7, 4]}}}  # one in four divides 64
    space = _space(mixers=(attention,), model={"d_model": 64, "depth": 100})
    model = space.sample(np.random.default_rng(0)).model
    assert {layer.token_mixer.values["num_heads"] for layer in model.layers} == {4}


def test_sample_of_a_nearly_empty_space_names_what_rules_it_out():
    """Where a demand leaves next to nothing, the error says which, instead of trying forever."""
    window = {"range": [1, 1_000_000, 1]}
    space = _space(
        mixers=({"softmax_attention": {"window": window, "num_heads": {"choice": [5, 7]}}}, "pooling"),
        channel=("none",),
        model={"d_model": 64, "depth": 1},  # too many options to check at load: never divisible
        constraints={"at_least_one_of": ["softmax_attention"]},
    )
    with pytest.raises(SpaceError, match="none of 1000") as caught:
        space.sample(np.random.default_rng(0))
    assert "at_least_one_of" in (caught.value.found or "")


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_mutate_changes_one_choice(space):
    """A child is in the space and differs from its parent in one choice, and in what that brings into play."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        parent = space.sample(rng)
        child = space.mutate(parent, rng)
        assert space.is_valid(child) is None
        assert (child == parent) == (space.size() == 1)
        before, after = space.choices(parent), space.choices(child)
        changed = [path for path in before.keys() & after.keys() if before[path] != after[path]]
        redrawn = "model.d_model" in changed or "model.position" in changed or space.tree.order.groups
        assert len(changed) <= 1 or redrawn


def test_mutate_reaches_every_axis():
    """Over many mutations each axis changes at some point."""
    space = SPACES["rope"]
    rng = np.random.default_rng(0)
    seen: set[str] = set()
    architecture = space.sample(rng)
    for _ in range(1000):
        child = space.mutate(architecture, rng)
        before, after = space.choices(architecture), space.choices(child)
        seen |= {path for path in before.keys() & after.keys() if before[path] != after[path]}
        architecture = child
    assert seen == {axis.path for axis in space.axes()}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_crossover_takes_every_choice_from_a_parent(space):
    """A child's choices come from its parents wherever one of them made that choice and it still fits."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        first, second = space.sample(rng), space.sample(rng)
        child = space.crossover(first, second, rng)
        assert space.is_valid(child) is None
        offers = [space.choices(first), space.choices(second)]
        for path, index in space.choices(child).items():
            inherited = {parent[path] for parent in offers if path in parent}
            assert not inherited or index in inherited or "token_mixer" in path  # drawn anew where it does not fit


def test_crossover_of_equal_parents_is_the_parent():
    """There is nothing to mix."""
    space = SPACES["plain"]
    rng = np.random.default_rng(0)
    parent = space.sample(rng)
    assert space.crossover(parent, parent, rng) == parent


def test_profiles_stand_at_the_ends_and_the_middle():
    """Smallest, centroid and largest take the first, middle and last value of each axis, numbers in ascending order."""
    space = _space(mixers=("pooling", GLA), model={"d_model": {"choice": [128, 32, 64]}})
    smallest, centroid, largest = (profile().model for profile in (space.smallest, space.centroid, space.largest))
    assert (smallest.d_model, centroid.d_model, largest.d_model) == (32, 64, 128)
    assert (smallest.depth, centroid.depth, largest.depth) == (1, 2, 3)
    assert [layer.token_mixer.key for layer in smallest.layers] == ["pooling"]
    assert largest.layers[2].token_mixer.values["expand_k"] == 1.0


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_profiles_are_valid(space):
    """Where the corner itself is invalid, the profile is a valid neighbour."""
    for profile in (space.smallest, space.centroid, space.largest):
        assert space.is_valid(profile()) is None


def test_layers_beyond_the_depth_have_no_axes():
    """An axis of a layer exists in architectures that reach it, and options only of the chosen component."""
    space = SPACES["plain"]
    rng = np.random.default_rng(0)
    for architecture in itertools.islice((space.sample(rng) for _ in range(100)), 100):
        paths = set(space.choices(architecture))
        depth = architecture.model.depth
        assert {f"block.token_mixer[{layer}]" for layer in range(3)} & paths == {
            f"block.token_mixer[{layer}]" for layer in range(depth)
        }
        for layer, config in enumerate(architecture.model.layers):
            path = f"block.token_mixer[{layer}].softmax_attention.num_heads"
            assert (path in paths) == (config.token_mixer.key == "softmax_attention")


def test_axes_are_listed_with_paths_and_values():
    """The axes read as the file does."""
    axes = {axis.path: axis for axis in SPACES["plain"].axes()}
    assert axes["model.d_model"] == Axis("model.d_model", (48, 64))
    assert list(axes["model.depth"].values) == [1, 2, 3]
    assert axes["block.token_mixer[2]"].values == ("softmax_attention", "gla", "pooling")
    assert axes["block.token_mixer[2].softmax_attention.num_heads"].values == (3, 4)
    assert "block.wiring" not in axes  # one value: nothing to choose


def test_heads_that_never_divide_are_refused_at_load():
    """What no choice can make valid is an error before any search."""
    with pytest.raises(SpaceError, match="can never be built") as caught:
        _space(mixers=({"softmax_attention": {"num_heads": {"choice": [5, 7]}}},))
    assert "does not divide" in (caught.value.found or "")


def test_heads_that_sometimes_divide_are_never_drawn_when_they_do_not():
    """3 heads go with 48 channels only."""
    every = list(_space(mixers=(ATTENTION,)).enumerate())
    heads = {(a.model.d_model, layer.token_mixer.values["num_heads"]) for a in every for layer in a.model.layers}
    assert heads == {(48, 3), (48, 4), (64, 4)}


def test_bidirectional_mixer_is_refused_in_a_decoder_only():
    """Language tasks are decoders by default; the same mixer is fine in an encoder."""
    with pytest.raises(SpaceError, match="looks ahead"):
        _space(mixers=("fourier",))
    assert _space(mixers=("fourier",), model={"task": "digits"}).tree.causal is False
    assert _space(mixers=("fourier",), model={"causal": False}).size() > 0


def test_required_components_are_in_every_architecture():
    """`at_least_one_of` holds for every draw; aliases count as their component."""
    space = SPACES["required"]
    rng = np.random.default_rng(0)
    for _ in range(200):
        keys = {layer.token_mixer.key for layer in space.sample(rng).model.layers}
        assert "gated_linear_attention" in keys


def test_ordered_components_switch_once():
    """Draws of a deep model never go back to an earlier group, and switch at every depth equally readily."""
    space = _space(
        mixers=("pooling", "softmax_attention"),
        channel=("none",),
        model={"d_model": 64, "depth": 12},
        constraints={"order": [["pooling"], ["softmax_attention"]]},
    )
    rng = np.random.default_rng(0)
    switches: Counter[int] = Counter()
    for _ in range(1300):
        keys = [layer.token_mixer.key for layer in space.sample(rng).model.layers]
        assert keys == sorted(keys, key=["pooling", "softmax_attention"].index)
        switches[keys.count("pooling")] += 1
    assert space.size() == len(switches) == 13
    parent = space.sample(rng)
    assert {space.mutate(parent, rng) for _ in range(50)} - {parent}


def test_order_holds_through_stages_and_patterns():
    """A convolution after attention is no architecture, in whichever stage or turn either stands."""
    data = {
        "schema": 1,
        "name": "pyramid",
        "model": {"task": "digits", "stem": {"image_patches": {"patch_size": 2}}},
        "stages": [
            {"d_model": 16, "depth": {"choice": [1, 3]}},
            {"d_model": 32, "depth": 3, "transition": "conv_downsample", "block": {"token_mixer": {"pattern": TURNS}}},
        ],
        "block": {
            "token_mixer": {"choice": ["pooling", "softmax_attention"], "per_layer": True},
            "channel_mixer": "mlp",
        },
        "constraints": {"order": [["pooling"], ["softmax_attention"]]},
    }
    space = Space.from_dict(data)
    every = list(space.enumerate())
    assert space.size() == len(set(every)) == len(every) == 2 + 4  # the switch lies before, between or after the layers
    rng = np.random.default_rng(0)
    assert {space.sample(rng) for _ in range(200)} == set(every)


def test_alias_presets_reach_the_architecture():
    """`swiglu` is `glu` with its activation set, and cannot be told otherwise."""
    glus = {layer.channel_mixer for a in SPACES["aliases"].enumerate() for layer in a.model.layers}
    assert ComponentConfig.of("glu", activation="silu", expansion=1.5) in glus
    with pytest.raises(SpaceError, match="not for the space to set"):
        _space(channel=({"swiglu": {"activation": "relu"}},))


def test_overlapping_entries_are_refused():
    """A component that two entries of a slot can give would be counted twice."""
    with pytest.raises(SpaceError, match="offered twice"):
        _space(channel=("swiglu", {"glu": {"activation": {"choice": ["relu", "silu"]}}}))
    assert _space(channel=("swiglu", {"glu": {"activation": {"choice": ["relu", "gelu"]}}})).size() > 0


def test_option_values_take_the_type_of_the_option():
    """An integer given for a float option is that float, so that equal architectures are equal."""
    space = _space(mixers=({"gla": {"expand_k": 1}},))
    value = space.smallest().model.layers[0].token_mixer.values["expand_k"]
    assert (value, type(value)) == (1.0, float)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_architecture_survives_json_and_pickle(space):
    """What a journal or another process gets back is equal, hash included."""
    architecture = space.sample(np.random.default_rng(0))
    copied = space.architecture(json.loads(json.dumps(architecture.to_dict())))
    assert copied == architecture
    assert hash(copied) == hash(architecture)
    assert pickle.loads(pickle.dumps(architecture)) == architecture


def test_space_survives_pickle():
    """A worker process draws what this one draws."""
    space = SPACES["required"]
    copied = pickle.loads(pickle.dumps(space))
    assert copied.sample(np.random.default_rng(3)) == space.sample(np.random.default_rng(3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data["stages"][0].update(d_model=1024), "d_model 1024"),
        (lambda data: data["stages"][0]["layers"][0].update(token_mixer={"mamba": {}}), "mamba"),
        (lambda data: data.update(head={"language_model": {"tied": True}}), "stem, head or macro"),
        (lambda data: data.update(causal=False), "causal False"),
    ],
)
def test_foreign_architecture_is_refused_with_a_reason(change, reason):
    """An architecture outside the space is named as such."""
    space = SPACES["plain"]
    data = space.smallest().to_dict()
    change(data)
    with pytest.raises(InputError) as caught:
        space.architecture(data)
    assert reason in (caught.value.found or "")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("norm"),
        lambda data: data.update(extra=1),
        lambda data: data.update(stages=[]),
        lambda data: data["stages"][0].update(d_model="2"),
        lambda data: data["stages"][0].update(layers=None),
        lambda data: data["stages"][0].update(transition=3),
        lambda data: data["stages"][0]["layers"][0].pop("wiring"),
        lambda data: data["stages"][0]["layers"][0].update(token_mixer="pooling"),
        lambda data: data["stages"][0]["layers"][0].update(token_mixer={"pooling": {"window": {}}}),
    ],
)
def test_malformed_architecture_is_bad_input(change):
    """Damaged data is an error with a place, not a traceback from inside."""
    data = SPACES["plain"].smallest().to_dict()
    change(data)
    with pytest.raises(InputError) as caught:
        Architecture.from_dict(data)
    assert (caught.value.where or "").startswith("architecture")


def test_description_counts_equal_layers():
    """One line, runs of equal layers counted."""
    space = _space(mixers=("pooling",), channel=("none",), model={"d_model": 64, "depth": 3})
    text = space.smallest().describe()
    assert text.startswith("d_model 64, depth 3, position none")
    assert ": 3 x [pooling" in text


def test_space_prints_axes_and_size():
    """`print(space)` shows the number of architectures and every axis once."""
    text = str(SPACES["required"])
    assert f"{SPACES['required'].size():,} architectures" in text
    assert "block.token_mixer.softmax_attention.num_heads  3, 4" in text
    assert "at least one of gated_linear_attention" in text


@pytest.mark.parametrize(("value", "violated"), [(10, False), (9, True), (20, False), (21, True), (float("nan"), True)])
def test_constraint_limits_are_inclusive(value, violated):
    """Limits themselves are allowed; NaN never is."""
    assert (Constraint("params", 10, 20).violation(value) is not None) == violated


def test_constraints_and_training_defaults_are_read():
    """Metric limits and suggested settings arrive as typed values."""
    space = _space(constraints={"params": {"max": 20e6}, "latency_ms": {"max": 5}}, training={"steps": 10})
    assert space.constraints == (Constraint("params", None, 20e6), Constraint("latency_ms", None, 5.0))
    assert (space.training.steps, space.training.batch_size) == (10, None)


def test_data_path_is_relative_to_the_space_file(tmp_path):
    """A space and its data can move together."""
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "space.yaml").write_text(
        "schema: 1\nname: own_data\nmodel: {task: char_lm, data: text.txt, d_model: 64, depth: 1}\n"
        "block: {token_mixer: pooling, channel_mixer: none}\n"
    )
    assert load_space(tmp_path / "space.yaml", fakes.registry()).data == str(tmp_path / "text.txt")


@pytest.mark.parametrize("name", shipped_spaces())
def test_shipped_space_loads_and_draws(name):
    """Every shipped space is valid with the shipped components, under its own name; one of the zoo holds one model."""
    space = load_space(name)
    assert name in (space.name, f"{ZOO}/{space.name}")
    assert (space.published is not None) == name.startswith(ZOO)
    assert space.size() == 1 or not name.startswith(ZOO)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert space.is_valid(space.sample(rng)) is None


@pytest.mark.parametrize("name", [name for name in shipped_spaces() if not name.startswith(ZOO)])
def test_shipped_space_builds_graphs(name):
    """Profiles and draws become graphs of the task's kind, and equal architectures have equal hashes."""
    space = load_space(name)
    signature = SIGNATURES[space.task]
    rng = np.random.default_rng(0)
    for architecture in (space.smallest(), space.centroid(), space.largest(), space.sample(rng), space.sample(rng)):
        graph = architecture.graph(signature, batch=2)
        assert [graph.type_of(value).shape for _, value in graph.outputs] == [signature.output_shape(2)]
        copied = Architecture.from_dict(architecture.to_dict())
        assert copied.canonical_hash(signature) == architecture.canonical_hash(signature)
    assert space.smallest().canonical_hash(signature) != space.largest().canonical_hash(signature)
