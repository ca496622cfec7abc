"""How long to train, with what settings, and the learning rate on the way; no torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ir.errors import InputError
from searchspaces.signature import Signature

_TOKENS_PER_STEP = 4096  # 16 sequences of 256: a step of a small model then takes tens of milliseconds on two cores


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train one candidate; exactly one limit is set.

    Steps and tokens end after the same number of updates everywhere, so that results repeat. A budget in seconds counts
    training alone, not set-up or validation; the number of updates then depends on the machine and its load, and so
    does the
    result: it does not repeat from run to run.

    Attributes:
        steps: Updates.
        tokens: Input positions read: tokens, times of a series, or pixels; rounded up to whole updates.
        seconds: Time spent in updates; the update under way is finished, and there is at least one.

    Raises:
        InputError: No limit or several, or one that is not positive.
    """

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        limits = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if len(given) != 1:
            raise InputError(
                "a training budget needs exactly one limit",
                where="budget",
                expected="steps, tokens or seconds",
                found=", ".join(given) or "none",
            )
        [(name, limit)] = given.items()
        _require_number(f"budget.{name}", limit, integer=name != "seconds")

    def total_steps(self, tokens_per_step: int) -> int | None:
        """Updates in the budget, or None where time decides.

        Args:
            tokens_per_step: Input positions in one update.

        Returns:
            At least 1.
        """
        if self.tokens is not None:
            return math.ceil(self.tokens / tokens_per_step)
        return self.steps

    def __str__(self) -> str:
        if self.steps is not None:
            return f"{self.steps} steps"
        return f"{self.tokens} tokens" if self.tokens is not None else f"{self.seconds:g} s"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Settings of AdamW, the schedule and the batch.

    Attributes:
        batch_size: Examples in one update, and in one call of validation.
        learning_rate: Peak, reached at the end of the warm-up.
        warmup: Fraction of the budget with a rising learning rate.
        final_fraction: Learning rate at the end, as a fraction of the peak.
        weight_decay: Decoupled decay of matrices; vectors, norms, embeddings and positions have none.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        grad_clip: Largest norm of the whole gradient.

    Raises:
        InputError: A setting out of range.
    """

    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        _require_number("train.batch_size", self.batch_size, integer=True)
        for name in ("learning_rate", "grad_clip"):
            _require_number(f"train.{name}", getattr(self, name), integer=False)
        for name in ("warmup", "final_fraction", "beta1", "beta2"):
            _require_fraction(f"train.{name}", getattr(self, name))
        if self.weight_decay != 0:
            _require_number("train.weight_decay", self.weight_decay, integer=False)

    @classmethod
    def for_signature(cls, signature: Signature) -> TrainOptions:
        """Settings that suit small models of a modality in a few hundred updates.

        Args:
            signature: Inputs and outputs of the task.

        Returns:
            The defaults: about 4,096 tokens in a batch of tokens, 64 images, 32 windows of a series, or 16 videos.
        """
        if signature.modality == "tokens":
            return cls(batch_size=min(64, max(4, _TOKENS_PER_STEP // signature.seq_len)), learning_rate=2e-3)
        if signature.modality == "image":
            return cls(batch_size=64, learning_rate=2e-3)
        batch_size = 16 if signature.modality == "video" else 32
        return cls(batch_size=batch_size, learning_rate=1e-3, weight_decay=0.01)


def learning_rate_factor(fraction: float, *, warmup: float, final_fraction: float) -> float:
    """Linear warm-up, then half a cosine down to the final fraction.

    Args:
        fraction: Part of the budget used at the end of the update, 0 to 1.
        warmup: Part of the budget with a rising rate.
        final_fraction: Factor at the end.

    Returns:
        What to multiply the peak learning rate with.
    """
    if fraction < warmup:
        return fraction / warmup
    descent = min(1.0, (fraction - warmup) / (1 - warmup)) if warmup < 1 else 1.0
    return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * descent)) / 2


def _require_number(where: str, value: object, *, integer: bool) -> None:
    expected = "a positive integer" if integer else "a positive finite number"
    kinds = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise InputError("bad training setting", where=where, expected=expected, found=repr(value))


def _require_fraction(where: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise InputError("bad training setting", where=where, expected="at least 0 and below 1", found=repr(value))
