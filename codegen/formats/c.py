"""A folder of C without a runtime: see docs/artifacts.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codegen import targets
from codegen.c_export import export as c_folder
from codegen.formats import Exported
from codegen.targets.base import Target
from ir.errors import InputError
from ir.graph import Graph
from ir.op import Array

SUFFIX = ""
NEEDS_TARGET = True


def export(
    graph: Graph,
    params: Mapping[str, Array],
    path: Path,
    *,
    step: Graph | None = None,
    target: Target | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a folder with `forward` and, where it is given, `step`; see `codegen.formats.Format.export`.

    Raises:
        InputError: The target is a graphics processor.
    """
    if target is not None and target.gpu is not None:
        raise InputError(
            "a folder of C runs on a processor alone", where="target", expected="cpu or arm64", found=target.name
        )
    graphs = {"forward": graph} if step is None else {"forward": graph, "step": step}
    made = c_folder.export(graphs, params, target or targets.get("cpu", threads=1), path, metadata=metadata)
    size_bytes = sum(file.stat().st_size for file in made.files)
    return Exported(path, made.files, size_bytes, made.verification_error, made.unverified)
