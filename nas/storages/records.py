"""How records become lines of JSON and back; architectures stay packed until somebody reads them."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from nas.storages.base import Record

_DECODE: Final = msgspec.json.Decoder(dict[str, Any]).decode
_DECODE_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_DECODE_FIELD: Final = msgspec.json.Decoder().decode
_TRIAL: Final = b'{"event":"trial"'
_PACKED: Final = "architecture"


class Packed(Mapping[str, Any]):
    """A JSON object that is decoded when it is first looked into: 100,000 architectures take gigabytes decoded.

    Args:
        raw: The object's text, known to be well formed.
    """

    __slots__ = ("_data", "_raw")

    def __init__(self, raw: bytes | msgspec.Raw) -> None:
        self._raw = raw
        self._data: dict[str, Any] | None = None

    def __getitem__(self, key: str) -> Any:
        return self._unpacked()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._unpacked())

    def __len__(self) -> int:
        return len(self._unpacked())

    def __repr__(self) -> str:
        return repr(self._unpacked())

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        """Travel as a plain dictionary."""
        return dict, (self._unpacked(),)

    def _unpacked(self) -> dict[str, Any]:
        if self._data is None:
            self._data, self._raw = _DECODE(self._raw), b""
        return self._data


def encode(record: Record) -> bytes:
    """Return a record as one line.

    Raises:
        ValueError: It holds infinity or a NaN, which JSON has no word for.
    """
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> Record:
    """Return the record of a line; the architecture of a trial is checked to be well formed and left packed.

    Raises:
        ValueError: It is no JSON object with an event, or not UTF-8.
    """
    if not line.isascii():
        line.decode()
    record: Record = _decode_trial(line) if line.startswith(_TRIAL) else _DECODE(line)
    if not isinstance(record.get("event"), str):
        raise ValueError("no event")
    return record


def _decode_trial(line: bytes) -> Record:
    record: dict[str, Any] = _DECODE_FIELDS(line)
    for name, raw in record.items():
        is_packed = name == _PACKED and memoryview(raw)[:1] == b"{"
        record[name] = Packed(raw) if is_packed else _DECODE_FIELD(raw)
    return record


@contextmanager
def without_collector() -> Iterator[None]:
    """Keep Python's cycle collector away while many objects are made that will stay; it would walk them all often."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()
            gc.unfreeze()  # the two together make them old at once, unwalked
            gc.enable()
