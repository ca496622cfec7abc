"""Put the bodies of components in place of their nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

from ir.builder import Builder, Tensor
from ir.component import Component
from ir.errors import GraphError
from ir.graph import Graph, Node, Value
from ir.ops.structure import Component as ComponentCall
from ir.passes.base import Pass
from ir.rewrite import Rewriter, inline, rebuild

Library = Callable[[str, str], type[Component]]
"""Gives the component class of a kind and a key."""


class _Buildable(Protocol):
    def build(self, b: Builder, *operands: Tensor) -> Tensor | tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class ExpandComponents(Pass):
    """Replace each component node by what its `build` adds, under the node's scope.

    Before: `%1 = component "norm" "rms_norm" %0 @ layers.0.norm`. After, with the parameter named
    `layers.0.norm.scale`: `%1 = parameter "layers.0.norm.scale" (d_model=8)`, `%2 = rms_norm %0, %1 @ layers.0.norm`.

    Attributes:
        library: Gives the component class of a kind and a key.
    """

    library: Library
    allow_components: ClassVar[bool] = False

    def run(self, graph: Graph) -> Graph:
        """The graph with operations only."""

        def visit(rewriter: Rewriter, node: Node) -> Sequence[Value]:
            if not isinstance(node.op, ComponentCall):
                return rewriter.add(node)
            return inline(rewriter, self._body(rewriter, node, node.op), node.operands, visit)

        return rebuild(graph, visit)

    def _body(self, rewriter: Rewriter, node: Node, call: ComponentCall) -> Graph:
        """The component's own graph, its operands as inputs and its results as outputs, in order."""
        builder = Builder()
        types = [rewriter.type_of(operand) for operand in node.operands]
        operands = [builder.input(f"operand{index}", kind.shape, kind.dtype) for index, kind in enumerate(types)]
        where = f"{node.path} ({call.kind} {call.key})"
        try:
            component = self.library(call.kind, call.key).create(dict(call.options))
            with builder.scope(node.scope):
                built = cast("_Buildable", component).build(builder, *operands)
        except GraphError as error:
            inside = f"{where}, {error.where}" if error.where else where
            raise GraphError(
                error.message, where=inside, expected=error.expected, found=error.found, hint=error.hint
            ) from error
        results = built if isinstance(built, tuple) else (built,)
        found = tuple(result.type for result in results)
        if found != node.types:
            raise GraphError(
                "a component gives other types than its node states",
                where=where,
                expected=", ".join(map(str, node.types)),
                found=", ".join(map(str, found)),
            )
        return builder.build(**{f"result{index}": result for index, result in enumerate(results)})
