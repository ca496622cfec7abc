"""`nas check`: what passes, what fails, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ir.errors import InputError
from nas.checks.zoo import check_component, check_zoo, zoo_names
from searchspaces.space import shipped_spaces
from tests.nas.test_cli import nas

SMALL = {
    "schema": 1,
    "name": "small",
    "published": {"paper": "A 2030", "url": "https://example.org", "params": 789, "macs": 26000, "source": "table 1"},
    "model": {
        "signature": {"modality": "image", "output": "class", "image_size": 8, "channels": 3, "num_classes": 5},
        "norm": "layer_norm",
        "d_model": 8,
        "depth": 1,
    },
    "block": {"token_mixer": "depthwise_conv2d", "channel_mixer": {"mlp": {"expansion": 2.0}}},
}


DEVIATIONS = ({}, {"params": -0.02}, {"params": 0.02}, {"params": -0.02, "macs": 0.05})


def small(folder: Path, **published: Any) -> Path:
    """A space of one small model, with other published numbers."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "published": {**SMALL["published"], **published}}))
    return path


def actual(folder: Path) -> dict[str, int]:
    """What the small model really costs."""
    report = check_zoo(str(small(folder)))
    return {"params": report.params, "macs": report.macs}


def test_small_model_passes_every_check(tmp_path: Path):
    """Parts, limits, kernels, compiled code and a step of training, each with its figure."""
    report = check_zoo(str(small(tmp_path, **actual(tmp_path))))
    assert [finding for finding in report.findings if not finding.passed] == []
    names = {finding.check for finding in report.findings}
    assert names >= {"published_params", "numpy_equals_reference", "gradients", "fast_kernels", "trains"}
    compiled = next(finding for finding in report.findings if finding.check == "compiled_equals_torch")
    assert 0 < (compiled.figure or 0) < 1e-4


def test_wrong_published_number_fails_unless_it_is_declared(tmp_path: Path):
    """2 percent off is no rounding, and a sentence alone excuses nothing: the difference must be the one declared."""
    true = actual(tmp_path)
    report = check_zoo(str(small(tmp_path, params=int(true["params"] * 1.02), macs=true["macs"])))
    failed = [finding for finding in report.findings if not finding.passed]
    assert [finding.check for finding in failed] == ["published_params"]
    assert f"{true['params']}" in failed[0].note
    wrong = {**true, "params": int(true["params"] * 1.02), "note": "the paper counts a bias"}
    passed = [check_zoo(str(small(tmp_path, **wrong, deviation=deviation))).passed for deviation in DEVIATIONS]
    assert passed == [False, True, False, False]


def test_search_space_is_no_published_architecture():
    """The error names those that are."""
    with pytest.raises(InputError, match="only a published architecture") as caught:
        check_zoo("tiny_lm")
    assert "zoo/convnext" in (caught.value.hint or "")


def test_component_can_be_checked_alone():
    """All its cases and limits."""
    findings = check_component("depthwise_conv2d")
    assert all(finding.passed for finding in findings)
    assert {finding.subject for finding in findings} == {f"depthwise_conv2d-{index}" for index in range(3)}


def test_check_verb_gives_json_and_an_exit_code(tmp_path: Path):
    """0 where all passes, 1 where a check fails, 2 for a name that is none."""
    result = nas("check", "layer_norm", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passed"] is True
    failed = nas("check", small(tmp_path, params=5), "--json")
    assert failed.exit_code == 1
    [report] = json.loads(failed.stdout)["architectures"]
    assert report["passed"] is False
    assert nas("check", "zoo").exit_code == 2
    assert nas("check", "no_such_thing").exit_code == 2


def test_zoo_files_are_named_after_their_systems():
    """One file a system, the name inside is the file's."""
    assert set(zoo_names()) == {name for name in shipped_spaces() if name.startswith("zoo/")}
    assert "zoo/convnext" in zoo_names()


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo_names())
def test_published_architecture_passes_its_checks(name: str):
    """What `nas check zoo --all` holds."""
    assert [finding for finding in check_zoo(name).findings if not finding.passed] == []
