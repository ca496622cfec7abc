"""The journal: append-only JSON lines in a run folder, the truth about a study.

`FOLDER/journal.jsonl` holds one record a line, each handed to the system whole before anything acts on it. `sync` has
the disk take all that was handed over, so that trials which end together share one wait for the disk.
`FOLDER/journal.lock` keeps a second process out. `FOLDER/trials/N/` holds the files of trial N.
A process may be killed at any byte: a line cut short at the end is dropped on the next open, with a notice.
"""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

from ir.errors import StorageError
from nas.storages.base import Record, Storage
from nas.storages.records import decode, encode, without_collector

JOURNAL_NAME = "journal.jsonl"
LOCK_NAME = "journal.lock"

# Records that come within this time of the last sync wait for the next one; a disk takes milliseconds for each.
_SYNC_AT_MOST_EVERY_S = 0.02

# A POSIX lock does not keep its own process out, and closing any descriptor of the file lets go of it.
_held: set[str] = set()


class Journal(Storage):
    """A study's records in a folder, held by this process alone.

    Args:
        folder: Run folder, made where it does not exist.

    Raises:
        StorageError: The folder cannot be used, another process holds it, or a line is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._notices: list[str] = []
        self._descriptor = -1
        _make_folder(self._folder)
        self._lock = _acquire_lock(self._folder / LOCK_NAME)
        self._size = 0
        self._is_synced = True
        self._synced_at = -_SYNC_AT_MOST_EVERY_S
        try:
            self._opened: list[Record] | None = self._open()
        except BaseException:
            self.close()
            raise

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def path(self) -> Path:
        """The file of records."""
        return self._folder / JOURNAL_NAME

    @property
    def notices(self) -> tuple[str, ...]:
        return tuple(self._notices)

    def records(self) -> list[Record]:
        """Return every record; they are not kept, so a second call reads the file again."""
        opened, self._opened = self._opened, None
        return opened if opened is not None else _read(self.path).records

    def append(self, *records: Record) -> None:
        if self._descriptor < 0:
            self._reopen()
        data = b"".join(encode(record) for record in records)
        try:
            _write_all(self._descriptor, data)
            self._is_synced = False
            if time.monotonic() - self._synced_at >= _SYNC_AT_MOST_EVERY_S:
                self._sync()
        except OSError as error:
            self._roll_back()
            raise _unwritable(self.path, error) from error
        self._size += len(data)
        self._opened = None

    def sync(self) -> None:
        try:
            self._sync()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def write_file(self, number: int, name: str, data: bytes) -> None:
        path = self._folder / "trials" / str(number) / name
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                _write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            partial.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _unwritable(path, error) from error

    def read_file(self, number: int, name: str) -> bytes | None:
        path = self._folder / "trials" / str(number) / name
        try:
            return path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise _unreadable(path, error) from error

    def remove_file(self, number: int, name: str) -> None:
        path = self._folder / "trials" / str(number) / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._lock >= 0:
            _held.discard(_identity(self._folder))
            os.close(self._lock)
            self._lock = -1

    def _sync(self) -> None:
        if not self._is_synced and self._descriptor >= 0:
            os.fsync(self._descriptor)
            self._is_synced, self._synced_at = True, time.monotonic()

    def _open(self) -> list[Record]:
        """Read the file, drop a torn last line, and open it for appending."""
        found = _read(self.path)
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if found.torn:
                os.ftruncate(self._descriptor, found.whole)
                os.fsync(self._descriptor)
                self._notices.append(f"{self.path}: dropped a last record that was cut short ({found.torn} bytes)")
            _sync_folder(self._folder)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._size = found.whole
        return found.records

    def _reopen(self) -> None:
        """Hold the folder again after `close`, unless another process wrote meanwhile."""
        self._lock = _acquire_lock(self._folder / LOCK_NAME)
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise _unwritable(self.path, error) from error
        if os.fstat(self._descriptor).st_size != self._size:
            self.close()
            raise StorageError(
                "another process went on with this study",
                where=str(self.path),
                hint="open the study again to see its trials",
            )

    def _roll_back(self) -> None:
        """Take a partly written record off the end; failing that, the next open drops it."""
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError as error:
            self._notices.append(f"{self.path}: a partly written record stays until the next open ({error.strerror})")


def read_journal(folder: str | Path) -> list[Record]:
    """Read the records of a run folder without holding it; a torn last line is left out.

    Args:
        folder: Run folder.

    Returns:
        Every record, oldest first; an architecture is a mapping, decoded when it is looked into.

    Raises:
        StorageError: There is no journal, it cannot be read, or a line is damaged.
    """
    path = Path(folder) / JOURNAL_NAME
    if not path.is_file():
        raise StorageError(
            "this folder holds no study",
            where=str(folder),
            expected=f"a file {JOURNAL_NAME}",
            hint="give the folder that `nas search --out` wrote",
        )
    return _read(path).records


def has_journal(folder: str | Path) -> bool:
    """Tell whether a folder holds the records of a study."""
    path = Path(folder) / JOURNAL_NAME
    return path.is_file() and path.stat().st_size > 0


@dataclass(frozen=True)
class _Found:
    """Records of the whole lines of a file, how many bytes those take, and how many a torn last line."""

    records: list[Record]
    whole: int
    torn: int


def _read(path: Path) -> _Found:
    records: list[Record] = []
    whole = 0
    try:
        with path.open("rb") as file, without_collector():
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return _Found(records, whole, len(line))
                records.append(_decode(line, number, path))
                whole += len(line)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unreadable(path, error) from error
    return _Found(records, whole, 0)


def _decode(line: bytes, number: int, path: Path) -> Record:
    try:
        return decode(line)
    except ValueError as error:
        raise _damaged(path, number, f"{line[:60]!r} ({error})") from error


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            "the run folder cannot be made",
            where=str(folder),
            expected="a path where a folder exists or can be made",
            found=error.strerror or str(error),
            hint="give another folder",
        ) from error


def _acquire_lock(path: Path) -> int:
    """Return a locked descriptor; its lock ends with this process, however that ends."""
    identity = _identity(path.parent)
    if identity in _held:
        raise _busy(path.parent, str(os.getpid()))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if isinstance(error, (BlockingIOError, PermissionError)):
            raise _busy(path.parent, holder) from error
        raise _unwritable(path, error) from error
    _held.add(identity)
    return descriptor


def _busy(folder: Path, holder: str) -> StorageError:
    return StorageError(
        "another study is running in this folder",
        where=str(folder),
        expected="one study at a time",
        found=f"held by process {holder or 'unknown'}",
        hint="wait for it to end, or give another folder",
    )


def _identity(folder: Path) -> str:
    return os.path.realpath(folder)


def _sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(path: Path, number: int, found: str) -> StorageError:
    return StorageError(
        "a line of the journal is damaged",
        where=f"{path}:{number}",
        expected="a JSON object with an event",
        found=found,
        hint="restore the file from a copy, or start a new study in another folder",
    )


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        "the run folder cannot be written",
        where=str(path),
        found=error.strerror or str(error),
        hint="make room or fix the permissions, then give the same command: the study resumes and nothing is lost",
    )


def _unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        "the run folder cannot be read",
        where=str(path),
        found=error.strerror or str(error),
        hint="fix the permissions, or give another folder",
    )
