"""Digits that bounce: how they fly, what is drawn from a seed, and that a model learns to follow them."""

from __future__ import annotations

import numpy as np
import pytest

from ir.errors import InputError
from nas.tasks.moving_digits import MovingDigits, bounce
from nas.train import Budget, TrainOptions, train
from searchspaces.space import Space

SMALL = MovingDigits(seq_len=5, horizon=5, frame_size=16, num_digits=1, validation_videos=128)


def centres(videos: np.ndarray) -> np.ndarray:
    """Centres of brightness `[B, T, 2]`, rows and columns."""
    grey, places = videos[..., 0], np.arange(videos.shape[2])
    total = grey.sum(axis=(2, 3))
    return np.stack([grey.sum(axis=3) @ places / total, grey.sum(axis=2) @ places / total], axis=-1)


def test_points_bounce_off_walls():
    """A point at 3 that moves by 2 between walls at 0 and 4 turns round at 4, and at 0 again."""
    start, velocity = np.array([[[3.0, 1.0]]]), np.array([[[2.0, 0.0]]])
    places = bounce(start, velocity, 6, 4.0)[0, :, 0]
    assert places[:, 0].tolist() == [3.0, 3.0, 1.0, 1.0, 3.0, 3.0]
    assert places[:, 1].tolist() == [1.0] * 6


def test_digit_moves_by_its_velocity_until_it_bounces():
    """One digit goes a tenth of its way from wall to wall in each frame, straight on but at walls, and never fades."""
    task = MovingDigits(num_digits=1, frame_size=200, seq_len=8, horizon=8, validation_videos=32)
    seen, wanted = task.validation_set()
    videos = np.concatenate([seen, wanted], axis=1).astype(np.float64)
    moves = np.diff(centres(videos), axis=1)
    straight = np.abs(np.diff(moves, axis=1)).max(axis=-1) < 2.01  # pixels, by which rounding bends a way
    assert 0.5 < straight.mean() < 1.0
    lengths = np.linalg.norm(moves, axis=-1)
    assert np.median(lengths) == pytest.approx(0.1 * (200 - 8), abs=0.5)
    assert lengths.max() < 0.1 * (200 - 8) + 1.5
    brightness = videos.sum(axis=(2, 3, 4))
    np.testing.assert_allclose(brightness, np.broadcast_to(brightness[:, :1], brightness.shape))


def test_videos_follow_their_seed():
    """Equal seeds draw equal videos, and the forecast goes on where the frames seen end."""
    first, again, other = (SMALL.train_batch(np.random.default_rng(seed), 4) for seed in (1, 1, 2))
    assert np.array_equal(first.inputs["video"], again.inputs["video"])
    assert np.array_equal(first.targets, again.targets)
    assert not np.array_equal(first.targets, other.targets)
    gap = np.abs(centres(first.targets)[:, 0] - centres(first.inputs["video"])[:, -1])
    assert gap.max() < 0.1 * (16 - 8) + 1.01


def test_pixels_are_those_of_the_brightest_digit():
    """Many digits are no brighter than white."""
    seen, _ = MovingDigits(num_digits=40, validation_videos=4).validation_set()
    assert seen.max() == 1.0
    assert (seen > 0.5).mean() > 0.3


def test_baselines_are_what_their_names_say():
    """Standing still is worse than black, which is worse than the mean frame; all are of the validation split."""
    task = MovingDigits()
    seen, wanted = task.validation_set()
    scores = task.baselines()
    assert scores["copy_last_frame"] == task.chance == pytest.approx(np.square(seen[:, -1:] - wanted).mean())
    assert scores["copy_last_frame"] > scores["black"] > scores["mean_frame"] > 0.02


def test_frames_have_room_for_digits():
    """A frame of 8 pixels leaves a digit nowhere to go."""
    with pytest.raises(InputError, match="bad frame_size"):
        MovingDigits(frame_size=8)


@pytest.mark.slow
def test_small_model_learns_to_follow_a_digit():
    """Layers over time, space, space, time come below copying, black and the mean frame in 200 updates."""
    space = Space.from_dict(
        {
            "schema": 1,
            "name": "follow",
            "model": {
                "task": "moving_digits",
                "d_model": 32,
                "depth": 4,
                "position": "sinusoidal",
                "norm": "layer_norm",
                "macro": {"axial": {"axes": "TSST"}},
            },
            "block": {
                "token_mixer": {"softmax_attention": {"num_heads": 4}},
                "channel_mixer": {"swiglu": {"expansion": 2.0}},
            },
        }
    )
    options = TrainOptions(batch_size=16, learning_rate=3e-3)
    trained = train(space.smallest(), SMALL, Budget(steps=200), seed=0, options=options)
    assert trained.quality < 0.95 * min(SMALL.baselines().values())
