"""Classification of scikit-learn's handwritten digits, 8 by 8 pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from nas.tasks.base import Array, Batch, Metric, Task
from searchspaces.signature import Signature

IMAGE_SIZE: Final = 8
NUM_CLASSES: Final = 10
_LARGEST_PIXEL: Final = 16.0
_VALIDATION_FRACTION: Final = 0.2
_SPLIT_SEED: Final = 0


@dataclass(frozen=True)
class Digits(Task):
    """Recognise a digit; measured in accuracy.

    1,797 grey images of the UCI "Optical Recognition of Handwritten Digits" test set, shipped with scikit-learn, pixels
    scaled to [0, 1]. One fifth of each class, drawn once with seed 0, is validation.
    """

    name = "digits"
    description = "scikit-learn's 8x8 handwritten digits, accuracy"
    metric = Metric("accuracy", "fraction")
    direction = "max"
    loss_kind = "cross_entropy"

    @property
    def signature(self) -> Signature:
        return Signature(modality="image", output="class", image_size=IMAGE_SIZE, channels=1, num_classes=NUM_CLASSES)

    @property
    def chance(self) -> float:
        return 1 / NUM_CLASSES

    def quality(self, *, loss: float, accuracy: float) -> float:
        return accuracy

    def train_batch(self, rng: np.random.Generator, batch_size: int) -> Batch:
        images_NHWC, labels_N, _, _ = _load_splits()
        rows = rng.integers(0, len(labels_N), size=batch_size)
        return self.batch(images_NHWC[rows], labels_N[rows])

    def validation_set(self) -> tuple[Array, Array]:
        _, _, images_NHWC, labels_N = _load_splits()
        return images_NHWC, labels_N

    def measure_baselines(self) -> dict[str, float]:
        """Accuracy of always answering the commonest class, and of logistic regression on the pixels."""
        from sklearn.linear_model import LogisticRegression  # a second to import, and only this needs it

        train_images, train_labels, images, labels = _load_splits()
        majority = np.bincount(train_labels).argmax()
        linear = LogisticRegression(max_iter=1000)  # converges in a few hundred
        linear.fit(train_images.reshape(len(train_images), -1), train_labels)
        return {
            "majority_class": float((labels == majority).mean()),
            "logistic_regression": float(linear.score(images.reshape(len(images), -1), labels)),
        }

    def fingerprint_arrays(self) -> Iterable[Array]:
        return _load_splits()


@lru_cache(maxsize=1)
def _load_splits() -> tuple[Array, Array, Array, Array]:
    """Training images [N,H,W,1] float32 and labels [N] int32, then validation images and labels."""
    from sklearn.datasets import load_digits  # a second to import, and only this needs it

    pixels_NF, classes_N = load_digits(return_X_y=True)
    images_NHWC = (pixels_NF / _LARGEST_PIXEL).astype(np.float32).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1)
    labels_N = classes_N.astype(np.int32)
    held_out_N = _stratified_mask(labels_N)
    return images_NHWC[~held_out_N], labels_N[~held_out_N], images_NHWC[held_out_N], labels_N[held_out_N]


def _stratified_mask(labels_N: Array) -> Array:
    """True for the validation examples: the same fraction of every class."""
    rng = np.random.default_rng(_SPLIT_SEED)
    mask_N = np.zeros(len(labels_N), dtype=bool)
    for label in range(NUM_CLASSES):
        rows = rng.permutation(np.flatnonzero(labels_N == label))
        mask_N[rows[: round(len(rows) * _VALIDATION_FRACTION)]] = True
    return mask_N
