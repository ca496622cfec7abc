"""Artifacts that were sent to a device, by their SHA-256, in a folder with a bound."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ir.errors import InputError, StorageError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".nas"


class Uploads:
    """Files by digest; those that were not used for longest go first.

    Args:
        folder: Where they lie; made where it is missing, for this user alone.
        largest_bytes: Bound on their sum; the newest is kept whatever its size.

    Raises:
        StorageError: The folder cannot be made.
    """

    def __init__(self, folder: Path, largest_bytes: int) -> None:
        self._folder, self._largest_bytes = folder, largest_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError("cannot keep artifacts", where=str(folder), found=error.strerror) from error
        for path in folder.glob("*.part"):  # of a server that was killed
            path.unlink(missing_ok=True)

    def find(self, digest: Any) -> Path | None:
        """Return the file of a digest and mark it as used; None where there is none.

        Raises:
            InputError: It is no digest.
        """
        path = self._folder / f"{check_digest(digest)}{_SUFFIX}"
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def missing(self, digests: Sequence[Any]) -> list[str]:
        """Return those that are not here."""
        return [digest for digest in digests if self.find(digest) is None]

    def begin(self, digest: Any, size: int) -> Upload:
        """Begin to receive a file.

        Raises:
            InputError: It is no digest.
            StorageError: There is no room.
        """
        name = check_digest(digest)
        self._trim(size)
        return Upload(self._folder / f"{secrets.token_hex(8)}.part", self._folder / f"{name}{_SUFFIX}", name)

    def describe(self) -> dict[str, int]:
        """Return how many files there are, their bytes, and the bound."""
        sizes = [size for _, size, _ in self._entries()]
        return {"files": len(sizes), "bytes": sum(sizes), "largest_bytes": self._largest_bytes}

    def _trim(self, wanted: int) -> None:
        kept = wanted
        for _, size, path in sorted(self._entries(), reverse=True):
            kept += size
            if kept > self._largest_bytes:
                path.unlink(missing_ok=True)

    def _entries(self) -> list[tuple[int, int, Path]]:
        found: list[tuple[int, int, Path]] = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        return found


class Upload:
    """A file on its way in; `finish` puts it in its place, and `cancel` leaves nothing.

    Args:
        part: Where it grows.
        path: Its place.
        digest: What its bytes must have.

    Raises:
        StorageError: It cannot be written.
    """

    def __init__(self, part: Path, path: Path, digest: str) -> None:
        self._part, self._path, self._digest = part, path, digest
        self._sha256 = hashlib.sha256()
        try:
            self._file = part.open("wb")
        except OSError as error:
            raise StorageError("cannot keep an artifact", where=str(part), found=error.strerror) from error

    def take(self, chunk: bytes) -> None:
        """Append a chunk.

        Raises:
            StorageError: The disk is full, or the like.
        """
        self._sha256.update(chunk)
        try:
            self._file.write(chunk)
        except OSError as error:
            raise StorageError("cannot keep an artifact", where=str(self._path), found=error.strerror) from error

    def finish(self) -> None:
        """Put the file in its place.

        Raises:
            InputError: Its bytes are others than announced.
        """
        self._file.close()
        if self._sha256.hexdigest() != self._digest:
            self.cancel()
            raise InputError("the file is not what was announced", expected=self._digest, found="another digest")
        os.replace(self._part, self._path)

    def cancel(self) -> None:
        """Leave nothing."""
        self._file.close()
        self._part.unlink(missing_ok=True)


def check_digest(digest: Any) -> str:
    """Return a digest that is one.

    Raises:
        InputError: It is none.
    """
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InputError("no such digest", expected="64 hexadecimal digits", found=repr(digest)[:80])
    return digest
