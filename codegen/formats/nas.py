"""The `.nas` artifact of this tool: see docs/artifacts.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codegen import targets
from codegen.compile import Source, compile_functions
from codegen.formats import Exported
from codegen.manifest import FORWARD, STEP
from codegen.targets.base import Target
from ir.graph import Graph
from ir.op import Array

SUFFIX = ".nas"
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
    """Compile a graph with default options and save it; see `codegen.formats.Format.export`."""
    sources = {FORWARD: Source(graph)} | ({} if step is None else {STEP: Source(step, STEP)})
    artifact = compile_functions(sources, params, target or targets.get("cpu"), metadata=metadata)
    artifact.save(path)
    return Exported(path, (path,), path.stat().st_size, artifact.verification_error, artifact.unverified)
