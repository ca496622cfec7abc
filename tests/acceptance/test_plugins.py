"""Components of third parties, added through entry points alone."""

from __future__ import annotations

import json

import pytest

from nas.storages.journal import read_journal
from tests.acceptance.driving import run, run_well, search_arguments, write_space

MIXER = '''
"""A mixer from elsewhere."""

from ir.component import Case, TokenMixer, option


class DoubledShift(TokenMixer):
    """Add the token before, doubled (a test, 2026).

    y_t = factor * x_{t-1}.
    """

    paper = "none"
    causality = "causal"
    cases = (Case({}),)
    factor: float = option(2.0, minimum=0.5, maximum=4.0, doc="Weight of the token before.")

    def build(self, b, x):
        batch, time, width = x.shape
        return b.pad(b.slice(x, 1, 0, time - 1), 1, 1, 0) * self.factor

    def reference(self, params, x):
        import numpy as np

        y = np.zeros_like(x)
        y[:, 1:] = self.factor * x[:, :-1]
        return y
'''
SPACE = """\
schema: 1
name: foreign
description: A component that this repository does not have.

model:
  task: char_lm
  seq_len: 16
  d_model: {choice: [16, 24]}
  depth: {choice: [1]}
  norm: layer_norm

block:
  token_mixer: {choice: [doubled_shift: {factor: {choice: [1.0, 2.0]}}]}
  channel_mixer: none

training: {steps: 2, batch_size: 2}
"""


def install(folder, distribution, entries):
    """Put a distribution with entry points of our components into a folder."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(MIXER)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {module}:DoubledShift" for name in entries]
    (info / "entry_points.txt").write_text("\n".join(["[nas.components]", *lines, ""]))


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


def test_component_of_a_third_party_is_listed_searched_and_shipped(tmp_path, site):
    """An entry point is all it takes: `nas list` shows it with its options, and a search trains and compiles it."""
    install(site, "foreign-mixers", ["token_mixer.doubled_shift"])
    listed = json.loads(run_well(["list", "components", "--json"], PYTHONPATH=str(site)).stdout)
    [entry] = [entry for entry in listed if entry["name"] == "doubled_shift"]
    assert entry["kind"] == "token_mixer"
    assert entry["options"]["factor"]["default"] == 2.0
    folder = tmp_path / "run"
    arguments = search_arguments(write_space(tmp_path, SPACE), folder, "--objective", "quality", "--json", trials=2)
    result = json.loads(run_well(arguments, PYTHONPATH=str(site)).stdout)
    assert result["trials"]["finished"] == 2
    assert result["front"][0]["artifact"] is not None
    architectures = [record["architecture"] for record in read_journal(folder) if record["event"] == "trial"]
    assert all(
        "doubled_shift" in layer["token_mixer"] for found in architectures for layer in found["stages"][0]["layers"]
    )


@pytest.mark.parametrize(
    ("distributions", "named"),
    [
        ({"foreign-mixers": ["token_mixer.pooling"]}, ("pooling", "searchspaces/token_mixers/pooling.py")),
        (
            {"foreign-mixers": ["token_mixer.twice"], "other-mixers": ["token_mixer.twice"]},
            ("twice", "other_mixers:DoubledShift"),
        ),
    ],
)
def test_components_of_one_name_are_an_error_that_names_both(site, distributions, named):
    """A key that is taken, by us or by another package, is bad input with both places; nothing is hidden silently."""
    for distribution, entries in distributions.items():
        install(site, distribution, entries)
    done = run(["list", "components", "--json"], PYTHONPATH=str(site))
    assert done.returncode == 2
    assert all(name in done.stderr for name in (*named, "foreign_mixers:DoubledShift")), done.stderr
    assert done.stdout == ""
