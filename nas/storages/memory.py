"""A storage that lasts as long as the process, for studies that need no run folder."""

from __future__ import annotations

from pathlib import Path

from nas.storages.base import Record, Storage


class Memory(Storage):
    """Keep records and files in the process.

    Args:
        records: What to start with, such as the records of a journal that is only looked at.
        folder: Run folder whose trial files may be read.
    """

    def __init__(self, records: list[Record] | None = None, folder: Path | None = None) -> None:
        self._records = list(records or ())
        self._files: dict[tuple[int, str], bytes] = {}
        self._folder = folder

    @property
    def folder(self) -> Path | None:
        return self._folder

    @property
    def notices(self) -> tuple[str, ...]:
        return ()

    def records(self) -> list[Record]:
        return list(self._records)

    def append(self, *records: Record) -> None:
        self._records.extend(records)

    def sync(self) -> None:
        pass

    def write_file(self, number: int, name: str, data: bytes) -> None:
        self._files[number, name] = data

    def read_file(self, number: int, name: str) -> bytes | None:
        if (number, name) in self._files or self._folder is None:
            return self._files.get((number, name))
        path = self._folder / "trials" / str(number) / name
        return path.read_bytes() if path.is_file() else None

    def remove_file(self, number: int, name: str) -> None:
        self._files.pop((number, name), None)

    def close(self) -> None:
        pass
