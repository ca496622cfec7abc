"""The YAML reader and the schema: what a file may say and how it is read."""

import copy
from typing import Any

import pytest

from ir.errors import SpaceError
from searchspaces.schema import parse_space, written
from searchspaces.yaml_source import MAX_NODES, Source, format_path, parse_yaml

MINIMAL = {
    "schema": 1,
    "name": "minimal",
    "model": {"task": "char_lm", "d_model": 64, "depth": 2},
    "block": {"token_mixer": "pooling", "channel_mixer": "none"},
}


def _parse(**changes) -> Any:
    data = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            data.setdefault(section, {})[key] = value
        else:
            data[section] = value
    parsed: Any = parse_space(Source("<dict>", data))
    return parsed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20_000_000", 20_000_000),
        ("20e6", 20e6),
        ("1e-3", 1e-3),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("'64'", "64"),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_scalar_is_read_as_yaml_1_2(text, value):
    """Scalars follow YAML 1.2 with underscores, not the surprises of 1.1."""
    found = parse_yaml(f"x: {text}", "f").data["x"]
    assert found == value
    assert type(found) is type(value)


def test_source_knows_the_place_of_keys_and_values():
    """Every key and value is found at its line and column."""
    source = parse_yaml("a:\n  b: [1, {c: 2}]\n", "f.yaml")
    assert source.where(("a", "b", 1, "c")) == "f.yaml:2:14"
    assert source.where(("a", "b"), at_key=True) == "f.yaml:2:3"
    assert source.where(("a", "b", 1, "missing")) == "f.yaml:2:10"


def test_format_path_reads_as_in_the_file():
    """Paths join keys by dots and indices by brackets."""
    assert format_path(("block", "token_mixer", "choice", 1, "gla")) == "block.token_mixer.choice[1].gla"


def test_alias_may_repeat_a_value():
    """Ordinary anchors and aliases work."""
    assert parse_yaml("a: &x [1, 2]\nb: *x", "f").data == {"a": [1, 2], "b": [1, 2]}


def test_alias_bomb_is_stopped_by_the_node_budget():
    """Aliases are counted as what they expand to, so that doubling thirty times never happens."""
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30))]
    with pytest.raises(SpaceError, match="too many values") as caught:
        parse_yaml("\n".join(lines), "f")
    assert str(MAX_NODES) in (caught.value.found or "")


def test_deep_nesting_is_refused_without_recursion_error():
    """Brackets beyond the depth limit are an error with a place, not a crash."""
    with pytest.raises(SpaceError) as caught:
        parse_yaml("x: " + "[" * 5000, "f")
    assert "32 levels" in (caught.value.found or "")


def test_chain_of_aliases_is_refused_without_recursion_error():
    """Aliases may not nest deeper than brackets may."""
    lines = ["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 120))]
    with pytest.raises(SpaceError, match="nest too deep"):
        parse_yaml("\n".join(lines), "f")


@pytest.mark.parametrize(
    ("domain", "form", "values"),
    [
        (64, "value", [64]),
        ({"choice": [64, 32]}, "choice", [64, 32]),
        ({"range": [2, 8, 3]}, "range", [2, 5, 8]),
        ({"range": [2, 9, 3]}, "range", [2, 5, 8]),
        ({"range": [4, 4, 1]}, "range", [4]),
    ],
)
def test_written_gives_the_values_of_each_form(domain, form, values):
    """Ranges include their upper end when a step lands on it."""
    found = written(_parse(model__d_model=domain).model.d_model)
    assert (found[0], list(found[1])) == (form, values)


def test_float_range_has_no_rounding_noise():
    """0.1 steps give 0.3, not 0.30000000000000004, and do not lose the last point."""
    space = _parse(block__channel_mixer={"mlp": {"expansion": {"range": [0.1, 0.5, 0.1]}}})
    domain = space.block.channel_mixer.choice[0]["mlp"]["expansion"]
    assert list(written(domain)[1]) == [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("mixer", ["pooling", {"pooling": None}, {"pooling": {}}, {"choice": ["pooling"]}])
def test_single_component_may_be_written_four_ways(mixer):
    """A name, a name with no options and a choice of one mean the same."""
    assert _parse(block__token_mixer=mixer).block.token_mixer.choice == [{"pooling": {}}]


def test_defaults_leave_out_what_most_spaces_do_not_say():
    """Only task, d_model, depth and the mixers must be given."""
    space = _parse()
    assert space.model.norm.choice == [{"rms_norm": {}}]
    assert space.model.position.choice == [{"none": {}}]
    assert space.block.wiring.choice == [{"pre_norm": {}}]
    assert space.constraints.params is None


def test_first_violation_of_a_file_is_reported():
    """Of several violations the one that stands first is raised, whatever order the schema checks in."""
    text = (
        "schema: 1\nname: two\nblock: {token_mixer: 3, channel_mixer: none}\nmodel: {task: x, d_model: 0, depth: 1}\n"
    )
    with pytest.raises(SpaceError) as caught:
        parse_space(parse_yaml(text, "f"))
    assert caught.value.where == "f:3:22"


def test_data_from_python_is_reported_without_lines():
    """A dictionary has paths but no lines."""
    with pytest.raises(SpaceError) as caught:
        _parse(model__depth=-1)
    assert caught.value.where == "<dict>"
    assert caught.value.message.startswith("model.depth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_number_from_python_is_refused(value):
    """What YAML cannot write is refused from Python too."""
    with pytest.raises(SpaceError):
        _parse(constraints={"params": {"max": value}})
    with pytest.raises(SpaceError):
        _parse(block__channel_mixer={"mlp": {"expansion": {"range": [1.0, value, 1.0]}}})
