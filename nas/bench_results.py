"""What `nas bench` found out about a run, kept in its folder: the latest result of each artifact and thread count."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ir.errors import StorageError
from ir.files import replace_file

FILE_NAME = "bench.json"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results kept in a run folder; none where there is no readable file."""
    try:
        kept = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [item for item in kept if isinstance(item, dict)] if isinstance(kept, list) else []


def keep_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Put a result in place of an older one of the same trial and threads; runtimes that only that one has stay.

    Args:
        folder: Run folder.
        result: What `codegen.peers.bench` gave, and the number of the `trial`.

    Raises:
        StorageError: It cannot be written.
    """

    def is_same(item: Mapping[str, Any]) -> bool:
        return all(item.get(key) == result[key] for key in ("trial", "threads"))

    kept = read_results(folder)
    older = next((item["results"] for item in kept if is_same(item)), {})
    merged = [item for item in kept if not is_same(item)] + [{**result, "results": {**older, **result["results"]}}]
    path = folder / FILE_NAME
    try:
        replace_file(path, json.dumps(merged, indent=1).encode())
    except OSError as error:
        raise StorageError("cannot keep the results", where=str(path), found=error.strerror) from error
