"""A search that ranks by a supernet: its audit, its fallback, its winners, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ir.errors import InputError
from nas import tasks
from nas.cli.app import app
from nas.objectives.params import Params
from nas.objectives.quality import WEIGHTS_FILE, Quality
from nas.search import search
from nas.study import Study
from nas.supernet.search import SUPERNET_FILE, Prepared, prepare_quality, train_winners
from nas.supernet.train import load_supernet
from nas.tasks.base import Task
from nas.training.budget import TrainOptions
from searchspaces.space import Space

OPTIONS = TrainOptions(batch_size=4, learning_rate=3e-3)
RECALL = Space.from_dict(
    {
        "schema": 1,
        "name": "supernet_search_test",
        "model": {
            "task": "mqar",
            "d_model": {"choice": [8, 16]},
            "depth": {"choice": [1, 2]},
            "position": "none",
            "norm": "rms_norm",
        },
        "block": {
            "token_mixer": {"per_layer": True, "choice": ["pooling", {"softmax_attention": {"num_heads": 2}}]},
            "channel_mixer": {"choice": ["none", "mlp"]},
        },
    }
)


SPACE_FILE = """
schema: 1
name: small
model: {task: mqar, seq_len: 32, d_model: {choice: [8, 16]}, depth: {choice: [1, 2]}, position: none, norm: rms_norm}
block:
  token_mixer: {per_layer: true, choice: [pooling, {softmax_attention: {num_heads: {choice: [1, 2]}}}]}
  channel_mixer: {choice: [none, mlp]}
training: {batch_size: 8}
"""


def recall_task() -> Task:
    return tasks.get("mqar", seq_len=16, vocab_size=16, num_pairs=3, validation_sequences=16)


def search_by_supernet(folder: Path, threshold: float) -> tuple[Study, Quality, Prepared]:
    quality = Quality(steps=3, options=OPTIONS)
    task = recall_task()
    prepared = prepare_quality(RECALL, task, quality, folder, seed=0, steps=4, anchors=3, threshold=threshold)
    objectives = [prepared.objective, Params()]
    study = search(RECALL, task=task, objectives=objectives, strategy="random", budget=4, storage=folder, seed=0)
    return study, quality, prepared


def test_a_search_ranks_by_the_supernet_and_trains_its_winners(tmp_path: Path) -> None:
    """Values say where they come from; winners have both scores, and a second call trains nothing again."""
    study, quality, prepared = search_by_supernet(tmp_path / "run", -1.0)
    assert prepared.audit.passes
    assert {trial.sources["quality"] for trial in study.trials} == {"supernet"}
    supernet = load_supernet(tmp_path / "run" / SUPERNET_FILE, recall_task())
    for trial in study.trials:
        assert trial.values["quality"] == supernet.evaluate(trial.architecture, recall_task()).quality
    heard: list[str] = []
    by_shared_weights = study.pareto_front()
    scores = train_winners(study, quality, prepared, notice=heard.append)
    assert len(heard) == len(scores) == len(by_shared_weights)
    assert {trial.number for trial in study.pareto_front()} <= set(scores)
    assert {score.source for score in scores.values()} == {"trained"}
    assert all(study.read_file(number, WEIGHTS_FILE) for number in scores)
    assert train_winners(study, quality, prepared, notice=heard.append) == scores
    assert len(heard) == len(scores)
    assert len(train_winners(study, quality, prepared, count=9)) == len(study.trials)
    assert study.front().certain == study.pareto_front()
    assert study.front().possible == ()
    study.close()
    again, _, repeated = search_by_supernet(tmp_path / "run", -1.0)
    assert repeated.audit == prepared.audit
    assert [trial.values for trial in again.trials] == [trial.values for trial in study.trials]


def test_a_search_falls_back_where_the_audit_fails(tmp_path: Path) -> None:
    """With a threshold that nothing reaches every trial is trained, and the audit says why."""
    study, _, prepared = search_by_supernet(tmp_path / "run", 1.1)
    assert not prepared.audit.passes
    assert {trial.sources["quality"] for trial in study.trials} == {"trained"}


def test_steps_of_a_supernet_are_needed_where_seconds_end_training(tmp_path: Path) -> None:
    """Seconds do not tell how many updates a supernet should have; the message asks for them."""
    with pytest.raises(InputError, match="supernet_steps"):
        prepare_quality(RECALL, recall_task(), Quality(seconds=1.0), tmp_path, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quality", "supernets"), "unknown source of quality"),
        (("--supernet-steps", "3"), "needs a supernet"),
        (("--quality", "supernet", "--objective", "params"), "no objective"),
    ],
)
def test_the_command_line_refuses_what_does_not_fit_a_supernet(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """Exit code 2 and a message, before anything is trained."""
    result = CliRunner().invoke(app, ["search", "tiny_recall", *arguments, "--no-ship", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_line_reports_both_scores(tmp_path: Path) -> None:
    """The JSON of a search holds the audit, and for each point of the front what it scores trained alone."""
    budget = ("--steps", "4", "--supernet-steps", "6", "--trials", "4", "--least-tau", "-1")
    arguments = (
        "--quality",
        "supernet",
        "--objective",
        "quality",
        "--no-ship",
        "--json",
        "--out",
        str(tmp_path / "run"),
    )
    result = CliRunner().invoke(app, ["search", "tiny_recall", *arguments, *budget])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["quality_source"] == "supernet"
    assert len(data["audit"]["alone"]) == 12
    assert set(data["trained_alone"]) == {str(point["trial"]) for point in data["front"]}
