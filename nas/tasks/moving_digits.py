"""Forecast of digits that bounce about a square (Srivastava et al. 2015, arXiv 1502.04681, Moving MNIST)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from nas.tasks.base import Array, Batch, Metric, Task, require_integer
from nas.tasks.digits import IMAGE_SIZE as DIGIT_SIZE
from nas.tasks.digits import Digits
from searchspaces.signature import Signature

_VALIDATION_SEED: Final = 20_150_216
_SPEED: Final = 0.1  # of the room that a digit has, in one frame


@dataclass(frozen=True)
class MovingDigits(Task):
    """Predict the next `horizon` frames of a video from the last `seq_len`; measured in mean squared error of pixels.

    Handwritten digits of 8x8 pixels, those of the task `digits`, fly straight at equal speed in a square frame, each in
    a direction of its own, and bounce off the walls; a pixel is that of the brightest digit there. In a frame a digit
    covers a tenth of its way from wall to wall. Training videos show training digits, validation videos the others.

    Attributes:
        seq_len: Frames seen.
        horizon: Frames to forecast.
        frame_size: Height and width of a frame, pixels.
        num_digits: Digits in a video.
        validation_videos: Videos in the fixed validation split.
    """

    seq_len: int = 10
    horizon: int = 10
    frame_size: int = 32
    num_digits: int = 2
    validation_videos: int = 256

    name = "moving_digits"
    description = "8x8 digits that bounce about a video, generated, mean squared error of pixels"
    metric = Metric("mse", "squared brightness, 1 is white")
    direction = "min"
    loss_kind = "mse"

    def __post_init__(self) -> None:
        for option in ("seq_len", "horizon", "num_digits"):
            require_integer(self.name, option, getattr(self, option), least=1, most=1 << 10)
        require_integer(self.name, "frame_size", self.frame_size, least=DIGIT_SIZE + 1, most=1 << 10)
        require_integer(self.name, "validation_videos", self.validation_videos, least=1)

    @property
    def signature(self) -> Signature:
        return Signature(
            modality="video",
            output="forecast",
            seq_len=self.seq_len,
            image_size=self.frame_size,
            channels=1,
            horizon=self.horizon,
        )

    @property
    def chance(self) -> float:
        """Of a video that stands still: the last frame seen, over and over."""
        seen, frames = self.validation_set()
        return float(((seen[:, -1:] - frames) ** 2).mean())

    def quality(self, *, loss: float, accuracy: float) -> float:
        return loss

    def train_batch(self, rng: np.random.Generator, batch_size: int) -> Batch:
        return self.batch(*self.generate(rng, batch_size, _digit_images()[0]))

    def validation_set(self) -> tuple[Array, Array]:
        return _validation_set(self)

    def generate(self, rng: np.random.Generator, count: int, images: Array) -> tuple[Array, Array]:
        """Draw videos of images `[N, 8, 8]`: frames seen float32 `[count, seq_len, S, S, 1]`, and those to forecast."""
        shape, room = (count, self.num_digits), self.frame_size - DIGIT_SIZE
        shown = images[rng.integers(0, len(images), shape)]
        angles, start = rng.uniform(0, 2 * np.pi, shape), rng.uniform(0, room, (*shape, 2))
        velocity = _SPEED * room * np.stack([np.sin(angles), np.cos(angles)], axis=-1)
        places = bounce(start, velocity, self.seq_len + self.horizon, room).round().astype(np.int64)
        frames = np.zeros((count, self.seq_len + self.horizon, self.frame_size, self.frame_size, 1), np.float32)
        for video, time, digit in np.ndindex(*places.shape[:3]):
            row, column = places[video, time, digit]
            window = frames[video, time, row : row + DIGIT_SIZE, column : column + DIGIT_SIZE, 0]
            np.maximum(window, shown[video, digit], out=window)
        return frames[:, : self.seq_len], frames[:, self.seq_len :]

    def measure_baselines(self) -> dict[str, float]:
        """Errors of repeating the last frame, of black frames, and of the mean frame of other videos."""
        _, frames = self.validation_set()
        rng = np.random.default_rng(_VALIDATION_SEED + 1)
        _, others = self.generate(rng, self.validation_videos, _digit_images()[0])
        return {
            "copy_last_frame": self.chance,
            "black": float((frames**2).mean()),
            "mean_frame": float(((others.mean(axis=(0, 1)) - frames) ** 2).mean()),
        }

    def fingerprint_arrays(self) -> Iterable[Array]:
        return self.validation_set()


def bounce(start: Array, velocity: Array, times: int, room: float) -> Array:
    """Places of points that fly straight between walls at 0 and `room` and are reflected there.

    Args:
        start: Places `[B, N, 2]` at time 0.
        velocity: Way in one time, the same shape.
        times: Times wanted.
        room: Distance of the walls.

    Returns:
        Places `[B, times, N, 2]`.
    """
    straight = start[:, None] + velocity[:, None] * np.arange(times)[:, None, None]
    return room - np.abs(straight % (2 * room) - room)


def _digit_images() -> tuple[Array, Array]:
    """Images `[N, 8, 8]` of the training and of the validation digits."""
    train, _, validation, _ = Digits().fingerprint_arrays()
    return train[..., 0], validation[..., 0]


@lru_cache(maxsize=4)
def _validation_set(task: MovingDigits) -> tuple[Array, Array]:
    return task.generate(np.random.default_rng(_VALIDATION_SEED), task.validation_videos, _digit_images()[1])
