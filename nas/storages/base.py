"""The contract of a storage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]


class Storage(ABC):
    """Records in the order they were appended, and files that belong to trials."""

    @property
    @abstractmethod
    def folder(self) -> Path | None:
        """The run folder, None where nothing is on disk."""

    @property
    @abstractmethod
    def notices(self) -> tuple[str, ...]:
        """What a user should hear about how the storage was opened."""

    @abstractmethod
    def records(self) -> list[Record]:
        """Return every record, oldest first."""

    @abstractmethod
    def append(self, *records: Record) -> None:
        """Add records; when this returns they survive the end of the process, after `sync` that of the machine.

        Raises:
            StorageError: They could not be written; none of them was.
        """

    @abstractmethod
    def sync(self) -> None:
        """Make every record survive a power cut; costs nothing when they do already.

        Raises:
            StorageError: The disk refused.
        """

    @abstractmethod
    def write_file(self, number: int, name: str, data: bytes) -> None:
        """Keep a file with a trial, whole or not at all.

        Raises:
            StorageError: It could not be written.
        """

    @abstractmethod
    def read_file(self, number: int, name: str) -> bytes | None:
        """Return a file kept with a trial, None where there is none."""

    @abstractmethod
    def remove_file(self, number: int, name: str) -> None:
        """Drop a file kept with a trial, where there is one.

        Raises:
            StorageError: It could not be removed.
        """

    @abstractmethod
    def close(self) -> None:
        """Let others use the storage; `append` takes it up again, and a second call does nothing."""
