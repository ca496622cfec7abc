"""Malformed spaces: each gives one clear error, whose text is kept in `tests/golden/malformed`."""

import re
from pathlib import Path

import pytest

from ir.errors import InputError
from searchspaces.space import load_space
from tests.searchspaces import fakes

FOLDER = Path(__file__).parent / "malformed"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def _error(name: str, **registry) -> InputError:
    with pytest.raises(InputError) as caught:
        load_space(name, **registry)
    return caught.value


@pytest.mark.parametrize("name", FILES)
def test_malformed_space_gives_its_golden_error(name, golden, monkeypatch):
    """The whole text of the error is what the golden file says, with a fixed set of components."""
    monkeypatch.chdir(FOLDER)
    golden(f"malformed/{Path(name).stem}.txt", str(_error(name, registry=fakes.registry())))


@pytest.mark.parametrize("name", FILES)
def test_malformed_space_is_bad_input_with_place_and_help(name, monkeypatch):
    """With the shipped components too, the error tells file and line, expected, found and what to do."""
    monkeypatch.chdir(FOLDER)
    error = _error(name)
    assert error.exit_code == 2
    assert re.match(rf"{re.escape(name)}:\d+(:\d+)?$", error.where or "")
    assert error.expected
    assert error.found
    assert error.hint


def test_malformed_spaces_are_at_least_thirty():
    """The collection did not shrink, and every golden file belongs to a space."""
    assert len(FILES) >= 30
    kept = {path.stem for path in (FOLDER.parents[1] / "golden" / "malformed").glob("*.txt")}
    assert kept == {Path(name).stem for name in FILES}


def test_missing_file_error_names_the_path(tmp_path):
    """A path that leads nowhere is bad input, not a traceback."""
    error = _error(str(tmp_path / "none.yaml"))
    assert "none.yaml" in (error.where or "")
    assert error.found == "no such file or directory"


def test_folder_instead_of_file_is_bad_input(tmp_path):
    """A folder is not a space."""
    (tmp_path / "space.yaml").mkdir()
    assert _error(str(tmp_path / "space.yaml")).found == "is a directory"


def test_file_too_large_is_refused_unread(tmp_path):
    """A file beyond the size limit is refused before it is parsed."""
    path = tmp_path / "large.yaml"
    path.write_text("# " + "x" * 300_000)
    assert "too large" in _error(str(path)).message


def test_unknown_shipped_name_gets_a_suggestion():
    """A misspelt name of a shipped space suggests the right one."""
    error = _error("tiny_ml")
    assert error.hint == "did you mean 'tiny_lm'?"


def test_error_about_an_aliased_value_points_at_its_anchor(tmp_path):
    """A bad value that an alias repeats is reported where it is written."""
    path = tmp_path / "space.yaml"
    path.write_text(
        "schema: 1\nname: aliased\nmodel:\n  task: char_lm\n  d_model: &w 0\n  depth: *w\n"
        "block: {token_mixer: pooling, channel_mixer: none}\n"
    )
    assert (_error(str(path), registry=fakes.registry()).where or "").endswith("space.yaml:5:12")
