"""Formats that a model can be written in: a file each, found by folder listing, the stem is the key.

A format file offers

- `SUFFIX`: what the name of its file ends in, empty where it writes a folder
- `NEEDS_TARGET`: whether it holds code, so that it is written for a target
- `export(graph, params, path, *, step=None, target=None, metadata=None) -> Exported`, which verifies what it writes and
  writes it whole or not at all

It is imported when it is asked for, so that listing the formats loads no compiler.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from codegen.targets.base import Target
from ir.errors import InputError, did_you_mean
from ir.graph import Graph
from ir.op import Array

__all__ = ["Exported", "Format", "available", "get"]


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: File or folder.
        files: Every file, in the order written.
        size_bytes: Bytes of all files.
        verification_error: Largest difference from torch, relative to the output's scale; None where it was not run.
        unverified: Why it was not run, empty where it was.
    """

    path: Path
    files: tuple[Path, ...]
    size_bytes: int
    verification_error: float | None
    unverified: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "path": str(self.path), "files": [str(file) for file in self.files]}


class Format(Protocol):
    """What a format file offers."""

    SUFFIX: str
    NEEDS_TARGET: bool

    def export(
        self,
        graph: Graph,
        params: Mapping[str, Array],
        path: Path,
        *,
        step: Graph | None = None,
        target: Target | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Exported:
        """Write a model.

        Args:
            graph: Its function `forward`, without component nodes.
            params: A float32 array for each parameter.
            path: File or folder to write.
            step: Its function for one token and the state before it, where it is wanted too.
            target: What to compile for, where the format needs a target.
            metadata: Anything to keep inside.

        Raises:
            CompileError: The graph cannot be written in this format.
            VerificationError: What was made disagrees with torch.
            StorageError: The file could not be written.
        """
        ...


def available() -> list[str]:
    """List the formats of this installation."""
    stems = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(stem for stem in stems if not stem.startswith("_"))


def get(name: str) -> Format:
    """Return a format by name.

    Raises:
        InputError: No such format.
    """
    names = available()
    if name not in names:
        raise InputError(
            "unknown format",
            where="format",
            expected=f"one of {', '.join(names)}",
            found=repr(name),
            hint=did_you_mean(name, names),
        )
    module: Any = importlib.import_module(f"codegen.formats.{name}")
    return module
