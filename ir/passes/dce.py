"""Dead code elimination."""

from __future__ import annotations

from dataclasses import dataclass

from ir.graph import Graph
from ir.passes.base import Pass
from ir.rewrite import keep_live


@dataclass(frozen=True)
class Dce(Pass):
    """Drop nodes and parameters that no output depends on; inputs stay, being part of the signature.

    Before: `%1 = exp %0`, `%2 = neg %0`, `return y=%2`. After: `%1 = neg %0`, `return y=%1`.
    """

    def run(self, graph: Graph) -> Graph:
        """The graph without dead nodes."""
        return keep_live(graph)
