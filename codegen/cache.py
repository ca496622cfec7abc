"""Compiled libraries on disk, so that an architecture is compiled once, whatever weights it comes back with.

A library depends on its kernels, their knobs, how values flow between them and in which order inputs and weights are
passed; on the target; and on the software that generates code. `Program.key` is a digest of exactly that. Names of
nodes, inputs and parameters, the weights themselves, and whatever `lower` simplifies away do not matter, so graphs of
equal canonical hash share their library, and so do different graphs that become the same kernels.

An entry is a file `<key>.so`: a digest of the library, then the library. Files are replaced whole; a damaged one counts
as absent. When the folder grows beyond its bound, the entries that were not used for longest are removed. So processes
need no lock: what another one removes is compiled again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ir
from codegen import machine
from codegen.targets.base import Target
from ir.files import replace_file

LARGEST_BYTES: Final = 512 * 1024 * 1024
"""Bound on a folder; a library of a dozen kernels takes 200 KB."""

_DIGEST_BYTES: Final = 32
_KEY_CHARACTERS: Final = 40
_SUFFIX: Final = ".so"
_TEMPORARY: Final = ".tmp"
_ABANDONED_NS: Final = 3600 * 10**9  # a temporary file this old belongs to a process that died


@dataclass(frozen=True)
class Program:
    """What decides the bytes of a library, besides target and software; all of it JSON.

    Attributes:
        inputs: Shape and dtype of each run-time input, in order.
        weights: The same of each packed weight.
        steps: For each call: kernel, knobs, operands, results.
        outputs: Values returned, each with its shape.
    """

    inputs: Sequence[Any]
    weights: Sequence[Any]
    steps: Sequence[Any]
    outputs: Sequence[Any]

    def key(self, target: Target) -> str:
        """Return the name of the library for a target, made by the software that is installed now."""
        fields = (self.inputs, self.weights, self.steps, self.outputs)
        where = (target.fingerprint, target.features, target.to_tvm(), machine.versions(), sources_digest())
        return hashlib.sha256(json.dumps((fields, where)).encode()).hexdigest()[:_KEY_CHARACTERS]


class LibraryCache:
    """Libraries by key in one folder, shared by processes.

    Args:
        folder: Where the files lie; made with the first one.
        largest_bytes: Bound on their sum.
    """

    def __init__(self, folder: str | Path, largest_bytes: int = LARGEST_BYTES) -> None:
        self.folder = Path(folder)
        self._largest_bytes = largest_bytes

    def get(self, key: str) -> bytes | None:
        """Return a library and mark it as used; None where there is none, or a damaged one."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        digest, library = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(library).digest() != digest:
            return None
        with suppress(OSError):  # another process has just removed it, or the folder is read-only
            os.utime(path)
        return library

    def put(self, key: str, library: bytes) -> None:
        """Keep a library, and remove old ones beyond the bound.

        A folder that cannot be written, or a full disk, is no error: the library is compiled again next time.
        """
        with suppress(OSError):
            replace_file(self._path(key), hashlib.sha256(library).digest() + library)
            self._trim()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _trim(self) -> None:
        entries: list[tuple[int, int, str]] = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                state = entry.stat()
                entries.append((state.st_mtime_ns, state.st_size, entry.path))
        kept_bytes, newest_ns = 0, max(entries, default=(0, 0, ""))[0]
        for used_ns, size, path in sorted(entries, reverse=True):
            if path.endswith(_SUFFIX):
                kept_bytes += size
                surplus = kept_bytes > self._largest_bytes
            else:
                surplus = path.endswith(_TEMPORARY) and newest_ns - used_ns > _ABANDONED_NS
            if surplus:
                with suppress(FileNotFoundError):
                    os.unlink(path)


@functools.cache
def sources_digest() -> str:
    """Digest of the sources that generate code: a changed generator never finds what it made before."""
    total = hashlib.sha256()
    for package in (Path(__file__).parent, Path(ir.__file__).parent):
        for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cuh")):
            total.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()
