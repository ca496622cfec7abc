"""Multi-query associative recall (Zoology, Arora et al. 2023, arXiv 2312.04927, section 4 and appendix)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from ir.errors import InputError
from nas.tasks.base import IGNORED_TARGET, Array, Batch, Metric, Task, require_integer
from searchspaces.signature import Signature

_VALIDATION_SEED: Final = 20_231_208
_GAP_POWER: Final = 0.01  # Zoology's power_a: near gaps between a pair and its query are likelier than far ones

_MOST_TOKENS: Final = 1 << 16


@dataclass(frozen=True)
class Mqar(Task):
    """Recall the value of a key seen earlier; measured in accuracy where a key is asked.

    A sequence opens with `num_pairs` distinct keys, each followed by its value. Then every key is asked once, at an
    even offset drawn from a power law, so that near ones are likelier. The other positions hold random values, never
    keys, so that no filler repeats a question. Keys are tokens 1 .. vocab_size/2 - 1, values the upper half. The
    target at a question is its value; no other position has one. Training sequences are generated as they are drawn.

    Attributes:
        seq_len: Tokens in a sequence.
        vocab_size: Tokens, half of them values.
        num_pairs: Keys to remember, and questions.
        validation_sequences: Sequences in the fixed validation split.
    """

    seq_len: int = 64
    vocab_size: int = 128
    num_pairs: int = 8
    validation_sequences: int = 512

    name = "mqar"
    description = "multi-query associative recall, generated, accuracy at the questions"
    metric = Metric("accuracy", "fraction")
    direction = "max"
    loss_kind = "cross_entropy"

    def __post_init__(self) -> None:
        require_integer(self.name, "num_pairs", self.num_pairs, least=1)
        require_integer(self.name, "seq_len", self.seq_len, least=4)
        require_integer(self.name, "vocab_size", self.vocab_size, least=4, most=_MOST_TOKENS)
        require_integer(self.name, "validation_sequences", self.validation_sequences, least=1)
        if 4 * self.num_pairs > self.seq_len:
            raise InputError(
                "the sequence has no room for all pairs and questions",
                where="mqar.seq_len",
                expected=f"at least 4 * num_pairs = {4 * self.num_pairs}",
                found=str(self.seq_len),
                hint="use fewer pairs or longer sequences",
            )
        if self.num_pairs > self.num_values - 1:
            raise InputError(
                "there are fewer keys than pairs",
                where="mqar.vocab_size",
                expected=f"at least 2 * num_pairs + 2 = {2 * self.num_pairs + 2}",
                found=str(self.vocab_size),
                hint="use fewer pairs or more tokens",
            )

    @property
    def num_values(self) -> int:
        """Tokens that are values; one fewer are keys, because token 0 is neither."""
        return self.vocab_size // 2

    @property
    def signature(self) -> Signature:
        return Signature(modality="tokens", output="next_token", seq_len=self.seq_len, vocab_size=self.vocab_size)

    @property
    def chance(self) -> float:
        return 1 / self.num_values

    def quality(self, *, loss: float, accuracy: float) -> float:
        return accuracy

    def train_batch(self, rng: np.random.Generator, batch_size: int) -> Batch:
        return self.batch(*self.generate(rng, batch_size))

    def validation_set(self) -> tuple[Array, Array]:
        return _validation_set(self)

    def generate(self, rng: np.random.Generator, count: int) -> tuple[Array, Array]:
        """Draw sequences.

        Args:
            rng: Source of randomness.
            count: Number of sequences.

        Returns:
            Tokens and targets, int32 `[count, seq_len]`; targets are `IGNORED_TARGET` where nothing is asked.
        """
        pairs, first_value = self.num_pairs, self.num_values
        rows = np.arange(count)[:, None]
        keys_BP = rng.random((count, self.num_values - 1)).argsort(axis=1)[:, :pairs] + 1
        values_BP = rng.integers(first_value, 2 * first_value, size=(count, pairs))
        tokens_BT = rng.integers(first_value, 2 * first_value, size=(count, self.seq_len))
        tokens_BT[:, : 2 * pairs : 2] = keys_BP
        tokens_BT[:, 1 : 2 * pairs : 2] = values_BP
        asked_BP = 2 * pairs + 2 * self._draw_gaps(rng, count)
        tokens_BT[rows, asked_BP] = keys_BP
        targets_BT = np.full((count, self.seq_len), IGNORED_TARGET)
        targets_BT[rows, asked_BP] = values_BP
        return tokens_BT.astype(np.int32), targets_BT.astype(np.int32)

    def _draw_gaps(self, rng: np.random.Generator, count: int) -> Array:
        """Distinct question slots of each pair, without replacement by the power law.

        The largest of Gumbel noise plus log weight is a weighted draw; the P largest, in order, are P draws without
        replacement.
        """
        slots = (self.seq_len - 2 * self.num_pairs) // 2
        log_weights_S = (_GAP_POWER - 1) * np.log(np.arange(1, slots + 1))
        scores_BS = log_weights_S + rng.gumbel(size=(count, slots))
        return (-scores_BS).argsort(axis=1)[:, : self.num_pairs]

    def measure_baselines(self) -> dict[str, float]:
        """Accuracy of always answering the commonest value, and of guessing among the values of the sequence."""
        tokens_BT, targets_BT = self.validation_set()
        asked_BT = targets_BT != IGNORED_TARGET
        answers_N = targets_BT[asked_BT]
        shown_BP = tokens_BT[:, 1 : 2 * self.num_pairs : 2]
        shown_NP = shown_BP[np.nonzero(asked_BT)[0]]
        _, drawn = self.generate(np.random.default_rng(_VALIDATION_SEED + 1), self.validation_sequences)
        commonest = np.bincount(drawn[drawn != IGNORED_TARGET]).argmax()
        return {
            "majority_value": float((answers_N == commonest).mean()),
            "any_value_shown": float((shown_NP == answers_N[:, None]).mean()),
        }

    def fingerprint_arrays(self) -> Iterable[Array]:
        return self.validation_set()


@lru_cache(maxsize=4)
def _validation_set(task: Mqar) -> tuple[Array, Array]:
    return task.generate(np.random.default_rng(_VALIDATION_SEED), task.validation_sequences)
