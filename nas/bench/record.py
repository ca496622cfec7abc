"""Rows of a bench: kept one by one in a file of JSON lines, so that an interrupted bench loses nothing."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from ir.errors import InputError, StorageError

Row: TypeAlias = dict[str, Any]

_IDENTITY: Final = ("suite", "isa", "model", "threads")
_SHARED: Final = ("machine", "code")  # the same for all rows of a bench, so a document has them once
_SOURCES: Final = ("ir", "codegen", "searchspaces", "nas/suites")


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file, on disk when this returns.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
    except OSError as error:
        raise StorageError("cannot keep the results", where=str(path), found=error.strerror) from error


def read(path: Path) -> list[Row]:
    """Read the rows of a file; of rows about the same thing, the last.

    Args:
        path: What `append` wrote, or a document that `nas bench --json` printed.

    Raises:
        InputError: There is no such file, or it holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError("cannot read the results", where=str(path), found=error.strerror) from error
    rows = _document_rows(text) or [row for line in text.splitlines() if (row := _parse(line)) is not None]
    if not rows:
        raise InputError("this file holds no results", where=str(path), expected="what `nas bench --suite` wrote")
    return list({tuple(row.get(key) for key in _IDENTITY): row for row in rows}.values())


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a row is about: suite, instruction set, model and threads."""
    return tuple(row.get(key) for key in _IDENTITY)


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """Bring rows into the form that `--json` prints.

    Returns:
        `{"machine", "fma_peak_gflops", "copy_gbs", "rows"}` and more: the peak and the bandwidth are the best of all
        rows, and `rooflines` has them by number of threads.
    """
    measured = [row for row in rows if row.get("fma_peak_gflops")]
    rooflines = {
        str(threads): {key: max(row[key] for row in measured if row["threads"] == threads) for key in _ROOFLINE}
        for threads in sorted({row["threads"] for row in measured})
    }
    return {
        "machine": rows[-1]["machine"] if rows else None,
        **{key: max((limits[key] for limits in rooflines.values()), default=None) for key in _ROOFLINE},
        "rooflines": rooflines,
        "code": rows[-1]["code"] if rows else None,
        "summary": summary(rows),
        "rows": [{key: value for key, value in row.items() if key not in _SHARED} for row in rows],
    }


_ROOFLINE: Final = ("fma_peak_gflops", "copy_gbs")


def summary(rows: Iterable[Row]) -> dict[str, Any]:
    """Sum up the ratios to the best peer: geometric mean, least, and how many rows have one."""
    found = [(row["ratio"], row) for row in rows if row.get("ratio")]
    if not found:
        return {"compared": 0, "geometric_mean": None, "least": None, "least_row": None}
    ratio, row = min(found, key=lambda item: item[0])
    mean = math.exp(sum(math.log(value) for value, _ in found) / len(found))
    least = f"{row['model']}, {row['dtype']}, {row['threads']} thread(s)"
    return {"compared": len(found), "geometric_mean": mean, "least": ratio, "least_row": least}


def code_digest() -> str:
    """Return a digest of the sources that decide a row."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _document_rows(text: str) -> list[Row]:
    try:
        found = json.loads(text)
    except ValueError:
        return []
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        return []
    return [{**row, **{key: found.get(key) for key in _SHARED}} for row in found["rows"]]


def _parse(line: str) -> Row | None:
    """Read a line; None for one that was cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "model" in row else None
