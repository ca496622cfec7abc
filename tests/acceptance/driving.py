"""Drive the real command line: a tiny space, `nas` in a process of its own, and what its run folder holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from nas.cli import main

SABOTAGE = Path(__file__).parent / "sabotage"
TIMEOUT_S = 240

# 4 widths, 1-2 layers: a trial takes well below a second.
SPACE = """\
schema: 1
name: acceptance
description: The smallest models that exercise the whole way.

model:
  task: char_lm
  seq_len: 16
  d_model: {choice: [16, 24, 32, 40]}
  depth: {range: [1, 2, 1]}
  norm: {choice: [rms_norm, layer_norm]}

block:
  token_mixer:
    per_layer: true
    choice:
      - pooling
      - depthwise_conv: {kernel_size: {choice: [2, 4]}}
      - softmax_attention: {num_heads: {choice: [2, 4]}}
  channel_mixer: {choice: [none, mlp]}

training: {steps: 5, batch_size: 4, learning_rate: 3e-3}
"""
DETERMINISTIC = ("--objective", "quality", "--objective", "params")


def write_space(folder: Path, text: str = SPACE) -> Path:
    """Write a space, and beside it a corpus that is read in no time.

    Args:
        folder: Where.
        text: The space.

    Returns:
        Path of the space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog; " * 200, encoding="utf-8")
    path = folder / "acceptance.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def search_arguments(space: Path, out: Path, *options: str, trials: int) -> list[str]:
    """Return the arguments of a search on one thread, so that its values do not depend on the executor."""
    data = str(space.parent / "corpus.txt")
    return [
        *("search", str(space), "--data", data, "--out", str(out), "--trials", str(trials), "--threads", "1"),
        *options,
    ]


def start(
    arguments: list[str], *, sabotage: Mapping[str, Any] | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start `nas`.

    Args:
        arguments: Its arguments.
        sabotage: Plan for `sabotage/sitecustomize.py`.
        environment: Further variables.
    """
    variables = {**os.environ, **environment}
    if sabotage is not None:
        paths = (str(SABOTAGE), variables.get("PYTHONPATH", ""))
        variables |= {"NAS_SABOTAGE": json.dumps(sabotage), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "nas", *arguments]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(
    arguments: list[str], *, sabotage: Mapping[str, Any] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `nas` to its end; arguments as of `start`."""
    with start(arguments, sabotage=sabotage, **environment) as process:
        try:
            out, errors = process.communicate(timeout=TIMEOUT_S)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, errors)


def run_well(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `nas` to its end, which must be a good one."""
    done = run(arguments, **options)
    assert done.returncode == 0, done.stderr
    return done


def run_here(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `nas` within this process, which has its libraries loaded already."""
    capfd.readouterr()
    code = exit_code(arguments)
    out, errors = capfd.readouterr()
    return subprocess.CompletedProcess(arguments, code, out, errors)


def exit_code(arguments: list[str]) -> int:
    """Run `nas` within this process and return its exit code."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with patch.object(sys, "argv", ["nas", *arguments]), pytest.raises(SystemExit) as ending:
            main()
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    return int(ending.value.code or 0)


def journal_bytes(folder: Path) -> bytes:
    """Return the whole journal of a run folder, nothing where there is none."""
    path = folder / "journal.jsonl"
    return path.read_bytes() if path.exists() else b""


def whole_lines(data: bytes) -> bytes:
    """Return the bytes up to the last line's end."""
    return data[: data.rfind(b"\n") + 1]


def files_below(folder: Path) -> set[str]:
    """Return every path below a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
