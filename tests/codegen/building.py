"""Building a graph in this process, as a worker does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from codegen.build import BuiltModel, build_and_run
from codegen.manifest import FORWARD
from codegen.targets.base import Target
from codegen.tuning import TuningDatabase
from ir.graph import Graph
from ir.op import Array


def run_graph(
    graph: Graph, params: Mapping[str, Array], target: Target, folder: Path, inputs: Mapping[str, Array]
) -> tuple[BuiltModel, dict[str, Array]]:
    """Build a graph with the tuning database of a folder and run it; return what was built, and the outputs."""
    built, outputs = build_and_run({FORWARD: graph}, params, target, TuningDatabase(folder), {FORWARD: inputs})
    assert outputs is not None
    return built, outputs[FORWARD]
