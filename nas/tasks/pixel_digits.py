"""Digits read pixel by pixel, after the sequential image tasks of Le, Jaitly and Hinton 2015, arXiv 1504.00941."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nas.tasks.base import Array, Batch, Metric, Task
from nas.tasks.digits import IMAGE_SIZE, NUM_CLASSES, Digits
from searchspaces.signature import Signature

_LEVELS = 17  # grey values 0 to 16


@dataclass(frozen=True)
class PixelDigits(Task):
    """Recognise a digit from its 64 grey values in row order; measured in accuracy.

    The images of the task `digits`, each pixel a token: where a pixel lies must be learned.
    """

    name = "pixel_digits"
    description = "8x8 handwritten digits as sequences of 64 grey values, accuracy"
    metric = Metric("accuracy", "fraction")
    direction = "max"
    loss_kind = "cross_entropy"

    @property
    def signature(self) -> Signature:
        tokens = IMAGE_SIZE * IMAGE_SIZE
        return Signature(modality="tokens", output="class", seq_len=tokens, vocab_size=_LEVELS, num_classes=NUM_CLASSES)

    @property
    def chance(self) -> float:
        return 1 / NUM_CLASSES

    def quality(self, *, loss: float, accuracy: float) -> float:
        return accuracy

    def train_batch(self, rng: np.random.Generator, batch_size: int) -> Batch:
        batch = Digits().train_batch(rng, batch_size)
        return self.batch(_as_tokens(batch.inputs["image"]), batch.targets)

    def validation_set(self) -> tuple[Array, Array]:
        images, labels = Digits().validation_set()
        return _as_tokens(images), labels

    def measure_baselines(self) -> dict[str, float]:
        return Digits().measure_baselines()

    def fingerprint_arrays(self) -> Iterable[Array]:
        return self.validation_set()


def _as_tokens(images: Array) -> Array:
    return np.rint(images * (_LEVELS - 1)).reshape(len(images), -1).astype(np.int32)
