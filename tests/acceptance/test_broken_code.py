"""Generated code that crashes, hangs or computes NaN costs its trial, with the reason in the journal, no more."""

from __future__ import annotations

import json

import pytest

from nas.storages.journal import read_journal
from tests.acceptance.driving import run_well, search_arguments, write_space

# One architecture for each way to break, told apart by their widths, and one that is sound.
BROKEN = {"16": "segfault", "24": "hang", "32": "nan", "40": "segfault_when_timed"}
SPACE = """\
schema: 1
name: broken
description: One architecture a width.

model:
  task: char_lm
  seq_len: 16
  d_model: {choice: [16, 24, 32, 40, 48]}
  depth: {choice: [1]}
  norm: layer_norm

block:
  token_mixer: {choice: [depthwise_conv]}
  channel_mixer: none

training: {steps: 2, batch_size: 2}
"""
REASONS = {
    "16": ("KernelCrash", "SIGSEGV"),
    "24": ("KernelTimeout", "ran out of time"),
    "32": ("VerificationError", "not finite"),
    "40": ("KernelCrash", "SIGSEGV"),
}


def width(record):
    return str(record["architecture"]["stages"][0]["d_model"])


@pytest.mark.parametrize("executor", [(), pytest.param(("--executor", "ray"), marks=pytest.mark.slow)])
def test_broken_generated_code_fails_its_trial_only(tmp_path, executor):
    """Each way to break is recorded as the reason of its trial; the sound trial finishes and ships, with exit 0."""
    space = write_space(tmp_path, SPACE)
    arguments = search_arguments(space, tmp_path / "run", "--objective", "latency", "--json", *executor, trials=5)
    done = run_well(arguments, sabotage={"break": BROKEN})
    records = read_journal(tmp_path / "run")
    widths = {record["trial"]: width(record) for record in records if record["event"] == "trial"}
    ends = {widths[record["trial"]]: record for record in records if record["event"] in ("finished", "failed")}
    assert {key: record["event"] for key, record in ends.items()} == dict.fromkeys(BROKEN, "failed") | {
        "48": "finished"
    }
    for key, parts in REASONS.items():
        assert all(part in ends[key]["reason"] for part in parts), ends[key]["reason"]
    result = json.loads(done.stdout)
    assert result["trials"] == {"finished": 1, "failed": 4, "infeasible": 0}
    assert [widths[point["trial"]] for point in result["front"]] == ["48"]
    assert result["front"][0]["artifact"] is not None


@pytest.mark.slow
def test_front_point_that_cannot_be_compiled_is_told_and_the_others_ship(tmp_path):
    """Without latency as objective generated code first runs when shipping: the reason is then in the journal."""
    space = write_space(tmp_path, SPACE)
    arguments = search_arguments(space, tmp_path / "run", "--objective", "params", "--json", trials=5)
    arguments += ["--objective", "flops", "--constraint", "params>=1"]
    sabotage = {"break": {"16": "segfault"}}
    done = run_well(arguments, sabotage=sabotage)
    [point] = json.loads(done.stdout)["front"]
    assert point["artifact"] is None
    assert "SIGSEGV" in done.stderr
    [record] = [record for record in read_journal(tmp_path / "run") if record["event"] == "unshipped"]
    assert record["trial"] == point["trial"]
    assert "KernelCrash" in record["reason"] and "SIGSEGV" in record["reason"]
    again = run_well(arguments)
    assert json.loads(again.stdout)["front"][0]["artifact"] is not None, "a later run ships what could not be shipped"
