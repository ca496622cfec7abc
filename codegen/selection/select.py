"""Which kernel serves each node: a graph becomes a list of kernel calls.

Rounds, each node served once:

1. Pairs of products that are multiplied, norms and state spaces that are gated take their gate with its activation.
2. Products with a known weight take what follows them into their epilogue: bias, activation, residual.
3. Operations with a generator of their own (attention, recurrences, norms, windows) get it.
4. What is left, elementwise and shape operations and reductions, is fused into chains.
5. Products of one input are computed together where every reader can read a window of the result.

A value that depends on parameters and constants alone is *static*: it is computed when the model is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx

from codegen.kernels.fused import FusedKernel
from codegen.selection.chains import fuse_chains
from codegen.selection.generators import GENERATORS
from codegen.selection.merging import merge_products
from codegen.selection.norms import take_gated_norm
from codegen.selection.products import is_weight_product, take_gated_product, take_product
from codegen.selection.state import KernelCall, Selection, Static
from codegen.selection.state_space import selective_scan
from ir.graph import Graph, Node, Value
from ir.ops import contraction as ct
from ir.ops import elementwise as ew
from ir.ops import normalization as nm
from ir.ops import recurrence as rc
from ir.ops import shape as sh
from ir.ops.structure import Constant, Input, Parameter


def select(graph: Graph) -> list[KernelCall]:
    """Choose kernels for every live node of an expanded graph.

    Returns:
        Calls in an order in which each reads what earlier ones made.

    Raises:
        CompileError: A node has no kernel.
    """
    state = Selection(graph, _static_nodes(graph), frozenset(value for _, value in graph.outputs))
    live = [node for node in graph.nodes if node.id in graph.live and node.id not in state.static]
    for node in live:
        if isinstance(node.op, ew.Mul) and state.is_free(node):
            take_gated_product(state, node)
    for node in live:
        if isinstance(node.op, nm.LayerNorm | nm.RmsNorm) and state.is_free(node):
            take_gated_norm(state, node)
        elif isinstance(node.op, rc.OuterScan) and node.op.decay == "state":
            selective_scan(state, node)
    for node in live:
        if isinstance(node.op, ct.Matmul) and state.is_free(node) and is_weight_product(state, node):
            take_product(state, node)
    for node in live:
        if state.is_free(node) and type(node.op) in GENERATORS:
            GENERATORS[type(node.op)](state, node)
    fuse_chains(state, live)
    calls = [*_in_order(state), *_output_copies(state)]
    return merge_products(graph, calls, aliases(graph, calls))


def aliases(graph: Graph, calls: Sequence[KernelCall]) -> dict[Value, Value]:
    """Values that are another value's memory under another shape: reshapes that no kernel serves."""
    served = {number for call in calls for number in call.nodes}
    found: dict[Value, Value] = {}
    for node in graph.nodes:
        if isinstance(node.op, sh.Reshape) and node.id not in served:
            found[node.results[0]] = found.get(node.operands[0], node.operands[0])
    return found


def _output_copies(state: Selection) -> list[KernelCall]:
    """Copies of the outputs that no kernel makes: inputs, whose memory the next call overwrites, and static values."""
    alias = aliases(state.graph, state.calls)
    made = {value for call in state.calls for value in call.results}
    roots = dict.fromkeys(alias.get(value, value) for _, value in state.graph.outputs)
    calls: list[KernelCall] = []
    for root in roots:
        if root not in made:
            operand = Static((root,)) if root.node in state.static else root
            source = Node(0, Input("x0", state.graph.type_of(root)), (), (state.graph.type_of(root),))
            kernel = FusedKernel(Graph([source], [("y", source.results[0])]))
            calls.append(KernelCall(kernel, (operand,), (root,), (root.node,)))
    return calls


def _static_nodes(graph: Graph) -> frozenset[int]:
    static: set[int] = set()
    for node in graph.nodes:
        known = isinstance(node.op, Parameter | Constant)
        if known or (node.operands and all(operand.node in static for operand in node.operands)):
            static.add(node.id)
    return frozenset(static)


def _in_order(state: Selection) -> list[KernelCall]:
    """Calls sorted so that each reads what earlier ones made; among ready ones, graph order."""
    makers = {value: index for index, call in enumerate(state.calls) for value in call.results}
    alias = aliases(state.graph, state.calls)
    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from(range(len(state.calls)))
    for index, call in enumerate(state.calls):
        for operand in call.operands:
            source = alias.get(operand, operand) if isinstance(operand, Value) else None
            if source in makers:
                order.add_edge(makers[source], index)
    ranked = nx.lexicographical_topological_sort(order, key=lambda index: max(state.calls[index].nodes))
    return [state.calls[index] for index in ranked]
