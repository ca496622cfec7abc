"""Language modelling on bytes: the Python standard library's own sources, or any text."""

from __future__ import annotations

import math
import os
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np

from ir.errors import DataError
from nas.tasks.base import MAX_DATA_BYTES, Array, Batch, Metric, Task, find_data, require_integer
from searchspaces.signature import Signature

VOCAB_SIZE: Final = 256
DEFAULT_CORPUS_BYTES: Final = 4 << 20

# Test suites, installed packages, and the two packages that hold generated tables rather than programs.
_LEFT_OUT_FOLDERS: Final = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)
_LEFT_OUT_PREFIX: Final = "_sysconfigdata"  # written at build time, full of machine paths

_FILES_PER_VALIDATION_FILE: Final = 20
_VALIDATION_FRACTION: Final = 0.1  # of a corpus of too few files to split by file

_BYTES_PER_PIECE: Final = 1 << 22


@dataclass(frozen=True)
class CharLm(Task):
    """Predict the next byte; measured in bits per byte.

    The default corpus is the `.py` files of this machine's standard library, sorted by path, up to 4 MiB: programs
    and prose that need no download. Every 20th file, counted from the 20th, is validation and the others are
    training. A text of the user's is split the same way where it is a folder of at least 20 files; otherwise its last
    10 % is validation. Validation reads windows that do not overlap, spread evenly over the validation bytes.

    Attributes:
        data: Text file, or folder read recursively (files with a NUL byte and hidden ones are left out); None is the
            default.
        seq_len: Bytes in a window.
        validation_bytes: Most bytes to predict in one validation; fewer where the split is smaller.
    """

    data: str | None = None
    seq_len: int = 256
    validation_bytes: int = 65_536

    name = "char_lm"
    description = "next byte of Python sources or of any text, bits per byte"
    metric = Metric("bits_per_byte", "bits/byte")
    direction = "min"
    loss_kind = "cross_entropy"

    def __post_init__(self) -> None:
        require_integer(self.name, "seq_len", self.seq_len, least=1)
        require_integer(self.name, "validation_bytes", self.validation_bytes, least=1, most=MAX_DATA_BYTES)
        if self.data is not None:
            find_data(self.name, self.data, folder_allowed=True)

    @property
    def signature(self) -> Signature:
        return Signature(modality="tokens", output="next_token", seq_len=self.seq_len, vocab_size=VOCAB_SIZE)

    @property
    def chance(self) -> float:
        return math.log2(VOCAB_SIZE)

    def quality(self, *, loss: float, accuracy: float) -> float:
        return loss / math.log(2)

    def train_batch(self, rng: np.random.Generator, batch_size: int) -> Batch:
        train, _ = self._splits()
        starts = rng.integers(0, len(train) - self.seq_len, size=batch_size)
        return self.batch(*_windows(train, starts, self.seq_len))

    def validation_set(self) -> tuple[Array, Array]:
        _, validation = self._splits()
        room = (len(validation) - 1) // self.seq_len
        wanted = max(1, self.validation_bytes // self.seq_len)
        slots = np.unique(np.linspace(0, room - 1, min(room, wanted)).round().astype(np.int64))
        return _windows(validation, slots * self.seq_len, self.seq_len)

    def measure_baselines(self) -> dict[str, float]:
        """Bits per byte of counting single bytes and pairs of bytes in the training split.

        The unigram adds one to every count; the bigram gives the unigram the weight of one observation per context.
        """
        train, _ = self._splits()
        inputs, targets = self.validation_set()
        unigram_V = np.bincount(train, minlength=VOCAB_SIZE) + 1.0
        unigram_V /= unigram_V.sum()
        pairs_VV = _count_pairs(train)
        bigram_VV = (pairs_VV + unigram_V) / (pairs_VV.sum(axis=1, keepdims=True) + 1.0)
        return {
            "unigram": float(-np.log2(unigram_V[targets]).mean()),
            "bigram": float(-np.log2(bigram_VV[inputs, targets]).mean()),
        }

    def fingerprint_arrays(self) -> Iterable[Array]:
        return self._splits()

    def _splits(self) -> tuple[Array, Array]:
        splits = _read_splits(self.data)
        for split, values in zip(("training", "validation"), splits, strict=True):
            if len(values) <= self.seq_len:
                raise DataError(
                    f"the {split} split is shorter than one window",
                    where=self.data or "the standard library",
                    expected=f"more than seq_len = {self.seq_len} bytes",
                    found=f"{len(values)} bytes",
                    hint="give a longer text or a smaller seq_len",
                )
        return splits


def _count_pairs(values: Array) -> Array:
    """How often each byte follows each other one; in pieces, because the codes are eight times the text."""
    counts = np.zeros(VOCAB_SIZE**2, dtype=np.int64)
    for start in range(0, len(values) - 1, _BYTES_PER_PIECE):
        piece = values[start : start + _BYTES_PER_PIECE + 1].astype(np.int64)
        counts += np.bincount(piece[:-1] * VOCAB_SIZE + piece[1:], minlength=VOCAB_SIZE**2)
    return counts.reshape(VOCAB_SIZE, VOCAB_SIZE)


def _windows(split: Array, starts: Array, seq_len: int) -> tuple[Array, Array]:
    window = split[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)
    return window[:, :-1], window[:, 1:]


@lru_cache(maxsize=2)
def _read_splits(data: str | None) -> tuple[Array, Array]:
    """Training and validation bytes, uint8."""
    if data is None:
        texts = _read_standard_library()
    else:
        path = find_data(CharLm.name, data, folder_allowed=True)
        texts = _read_texts(_text_files(path) if path.is_dir() else [path], data)
    if len(texts) >= _FILES_PER_VALIDATION_FILE:
        step = _FILES_PER_VALIDATION_FILE
        held_out = texts[step - 1 :: step]
        kept = [text for number, text in enumerate(texts, start=1) if number % step]
        return _to_bytes(kept), _to_bytes(held_out)
    values = _to_bytes(texts)
    border = round(len(values) * (1 - _VALIDATION_FRACTION))
    return values[:border], values[border:]


def _to_bytes(texts: Sequence[bytes]) -> Array:
    return np.frombuffer(b"".join(texts), dtype=np.uint8)


def _read_standard_library() -> list[bytes]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[bytes] = []
    total_bytes = 0
    for path in standard_library_files(root):
        text = path.read_bytes()
        total_bytes += len(text)
        if total_bytes > DEFAULT_CORPUS_BYTES:
            break
        texts.append(text)
    if len(texts) < _FILES_PER_VALIDATION_FILE:
        raise DataError(
            "this Python keeps no readable sources of its standard library",
            where="char_lm",
            expected=f"at least {_FILES_PER_VALIDATION_FILE} .py files",
            found=f"{len(texts)}",
            hint="name a text of yours: data: path/to/text",
        )
    return texts


def standard_library_files(root: Path) -> list[Path]:
    """Source files of the default corpus, in its order.

    Args:
        root: Folder of the standard library.

    Returns:
        Paths sorted by their parts below the root.
    """
    kept = _walk(root, lambda folder: folder not in _LEFT_OUT_FOLDERS)
    return [path for path in kept if path.suffix == ".py" and not path.name.startswith(_LEFT_OUT_PREFIX)]


def _walk(root: Path, enters: Callable[[str], bool]) -> list[Path]:
    """Files below a folder, sorted by their parts, from folders that `enters` lets in by name."""
    found: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if enters(name)]
        found += [Path(folder, name) for name in files]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.parts)


def _text_files(folder: Path) -> list[Path]:
    visible = _walk(folder, lambda name: not name.startswith("."))
    return [path for path in visible if not path.name.startswith(".")]


def _read_texts(paths: Sequence[Path], data: str) -> list[bytes]:
    texts: list[bytes] = []
    total_bytes = 0
    for path in paths:
        text = _read_file(path)
        if b"\0" in text:
            continue
        total_bytes += len(text)
        if total_bytes > MAX_DATA_BYTES:
            raise DataError(
                "the text is too large",
                where=data,
                expected=f"at most {MAX_DATA_BYTES} bytes",
                found=f"{total_bytes} bytes up to {path}",
                hint="name a smaller folder",
            )
        texts.append(text)
    if not total_bytes:
        raise DataError("no text found", where=data, expected="a text file, or a folder that holds some", found="none")
    return texts


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError("a text cannot be read", where=str(path), found=error.strerror) from error
