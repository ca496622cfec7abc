"""ONNX: one file that other runtimes read; a step stands in a second file, `NAME.step.onnx`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codegen.formats import Exported
from codegen.onnx_export.export import to_onnx
from codegen.onnx_export.verification import compare, is_runnable
from codegen.targets.base import Target
from ir.errors import StorageError
from ir.files import replace_file
from ir.graph import Graph
from ir.op import Array

SUFFIX = ".onnx"
NEEDS_TARGET = False


def export(
    graph: Graph,
    params: Mapping[str, Array],
    path: Path,
    *,
    step: Graph | None = None,
    target: Target | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model, checked by ONNX and held against torch in ONNX Runtime; see `codegen.formats.Format.export`."""
    models = {path: graph} if step is None else {path: graph, path.with_suffix(".step.onnx"): step}
    made = {
        file: to_onnx(function, params, metadata).SerializeToString(deterministic=True)
        for file, function in models.items()
    }
    errors = [compare(models[file], params, data) for file, data in made.items()] if is_runnable() else []
    for file, data in made.items():
        try:
            replace_file(file, data)
        except OSError as error:
            raise StorageError("the model could not be written", where=str(file), found=error.strerror) from error
    unverified = "" if errors else "ONNX Runtime is not installed"
    size = sum(len(data) for data in made.values())
    return Exported(path, tuple(made), size, max(errors, default=None), unverified)
