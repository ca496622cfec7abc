"""Bring equal computations into one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ir.graph import Graph
from ir.op import OPS, Op
from ir.passes._arithmetic_rules import ARITHMETIC_RULES
from ir.passes._shape_rules import SHAPE_RULES
from ir.passes.base import Pass
from ir.rewrite import Rule, rewrite


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Remove operations that do nothing and choose one way to write the rest; each rule shows its before -> after.

    Every rewrite gives the same numbers in any dtype, up to the sign of a zero: none reorders or merges roundings.
    """

    def run(self, graph: Graph) -> Graph:
        """The graph with every rule applied to every node, operands first."""
        return rewrite(graph, _rules())


@cache
def _rules() -> dict[type[Op], Sequence[Rule]]:
    rows = (*ARITHMETIC_RULES, *SHAPE_RULES)
    return {kind: [rule for kinds, rule in rows if issubclass(kind, kinds)] for kind in OPS.values()}
