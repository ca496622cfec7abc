"""Generated tasks that tell mixers apart: what they ask, and that an algorithm solves them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ir.errors import InputError
from nas import tasks
from nas.probe import PROBES, probe, shrink
from nas.tasks.base import IGNORED_TARGET
from nas.tasks.in_context_regression import InContextRegression
from nas.tasks.listops import Listops, _evaluate
from nas.tasks.pixel_digits import PixelDigits
from nas.tasks.selective_copy import SelectiveCopy
from searchspaces.space import Space, load_space

GENERATED = ("induction", "selective_copy", "listops")


@pytest.mark.parametrize("name", GENERATED)
def test_oracle_solves_the_task_and_a_guess_does_not(name):
    """The algorithm is always right; the commonest answer is right about as often as chance says."""
    task = tasks.get(name)
    scores = task.baselines()
    assert scores["oracle"] == 1.0
    assert abs(scores["majority_answer"] - task.chance) < 0.15  # ListOps prefers large and small digits


@pytest.mark.parametrize("name", GENERATED)
def test_sequences_follow_their_seed(name):
    """The same seed gives the same sequences, another one others."""
    task: Any = tasks.get(name)
    first, again, other = (task.generate(np.random.default_rng(seed), 5)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ([12, 4, 9, 1], 7),  # [MAX 2 7]
        ([13, 4, 9, 1], 2),  # [MIN 2 7]
        ([14, 4, 9, 11, 1], 7),  # [MED 2 7 9]
        ([15, 9, 8, 1], 3),  # [SM 7 6]
        ([12, 4, 13, 9, 6, 1, 3, 1], 4),  # [MAX 2 [MIN 7 4] 1]
    ],
)
def test_listops_evaluates_as_the_paper_does(expression, value):
    """Digits are tokens 2 to 11, operations 12 to 15, 1 closes a list."""
    assert _evaluate(expression) == value


def test_listops_fits_its_length():
    """Expressions end at the end of the sequence, and many of them nest."""
    tokens, _ = Listops(seq_len=16).generate(np.random.default_rng(0), 200)
    assert (tokens[:, -1] == 1).all()
    assert ((tokens >= 12).sum(axis=1) > 1).mean() > 0.2


def test_selective_copy_asks_for_the_contents_in_order():
    """What is left without blanks is what is asked for, token by token."""
    task = SelectiveCopy(seq_len=20, num_contents=4)
    tokens, targets = task.generate(np.random.default_rng(0), 50)
    for row, answers in zip(tokens, targets, strict=True):
        assert [token for token in row if token > 1] == [token for token in answers if token != IGNORED_TARGET]
    with pytest.raises(InputError, match="no room"):
        SelectiveCopy(seq_len=7, num_contents=4)


def test_least_squares_solves_regression_in_context():
    """With more pairs than unknowns the answer is exact up to float32; with fewer it is not."""
    scores = InContextRegression().baselines()
    assert scores["least_squares"] < 1e-10
    assert scores["zero"] == pytest.approx(InContextRegression().chance, rel=0.2)
    assert InContextRegression(seq_len=3).baselines()["least_squares"] > 0.01


def test_pixels_are_the_images_in_row_order():
    """Token 8 r + c is the grey value of row r, column c."""
    images, labels = tasks.get("digits").validation_set()
    tokens, same = PixelDigits().validation_set()
    assert np.array_equal(labels, same)
    assert tokens[5, 8 * 3 + 4] == round(float(images[5, 3, 4, 0]) * 16)


def test_probe_reports_a_share_for_each_task_that_fits():
    """A space of decoders does the language probes and not the images; a few steps already beat nothing wrong."""
    report = probe("tiny_lm", steps=2, d_model=16, only=("induction", "listops", "in_context_regression"))
    assert [score.task for score in report.scores] == ["induction", "listops", "in_context_regression"]
    assert all(score.share is not None for score in report.scores)
    with pytest.raises(InputError, match="no such probe"):
        probe("tiny_lm", only=("chess",))
    assert set(PROBES) <= set(tasks.names())


def test_probe_shrinks_heads_to_its_width():
    """12 heads do not fit 16 channels; 4 do."""
    space = Space.from_dict(
        {
            "schema": 1,
            "name": "wide",
            "model": {"task": "char_lm", "d_model": 48, "depth": 6},
            "block": {"token_mixer": {"softmax_attention": {"num_heads": 12}}, "channel_mixer": "mlp"},
        }
    )
    small = shrink(space.smallest(), 16).model
    assert (small.d_model, small.depth, small.layers[0].token_mixer.values["num_heads"]) == (16, 2, 4)
    assert shrink(load_space("tiny_vision").smallest(), 32).model.causal is False
