"""Which kernel serves each node: a graph becomes a list of kernel calls.

Three rounds, each node served once:

1. Products with a known weight take what follows them into their epilogue: bias, activation, gate, residual.
2. Operations with a generator of their own (attention, recurrences, norms, windows) get it.
3. What is left, elementwise and shape operations and reductions, is fused into chains.

A value that depends on parameters and constants alone is *static*: it is computed when the model is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import networkx as nx

from codegen.kernels.attention import AttentionKernel
from codegen.kernels.base import Kernel
from codegen.kernels.batch_gemm import BatchGemmKernel
from codegen.kernels.expressions import is_fusible
from codegen.kernels.fused import FusedKernel
from codegen.kernels.gemm import GemmKernel
from codegen.kernels.norm import NormKernel
from codegen.kernels.recurrence import OuterScanKernel
from codegen.kernels.rope import RopeKernel
from codegen.kernels.scan import ScanKernel
from codegen.kernels.selective_scan import SelectiveScanKernel
from codegen.kernels.window import WindowKernel
from ir.errors import CompileError
from ir.graph import Graph, Node, Value
from ir.op import Op
from ir.ops import attention as at
from ir.ops import contraction as ct
from ir.ops import convolution as cv
from ir.ops import elementwise as ew
from ir.ops import normalization as nm
from ir.ops import recurrence as rc
from ir.ops import reduction as rd
from ir.ops import shape as sh
from ir.ops.structure import Constant, Input, Parameter

ACTIVATION_NAMES: Final[dict[type[Op], str]] = {
    ew.Relu: "relu",
    ew.Gelu: "gelu",
    ew.Silu: "silu",
    ew.Sigmoid: "sigmoid",
    ew.Tanh: "tanh",
    ew.Softplus: "softplus",
}
COSTLY: Final = (ew.Exp, ew.Log, ew.Sin, ew.Cos, ew.Tanh, ew.Erf, ew.Sigmoid, ew.Silu, ew.Gelu, ew.Softplus, ew.Pow)
"""Functions that are not computed again for each element of a broadcast."""
POSITIVE: Final = (ew.Exp, ew.Relu, ew.Sigmoid, ew.Softplus, ew.Square)
"""Functions that are never negative."""
LARGEST_CHAIN: Final = 24
"""Nodes of a chain, so that its expression stays quick to compile."""


@dataclass(frozen=True)
class Static:
    """An array known when the model is compiled: static values, concatenated along the last axis.

    Attributes:
        values: Static values of the graph, one or more.
        transpose: Whether each is used with its last two axes swapped.
    """

    values: tuple[Value, ...]
    transpose: bool = False


@dataclass(frozen=True)
class Table:
    """An array that the kernel itself asks for."""

    constant: Constant


Operand = Value | Static | Table


@dataclass(frozen=True)
class KernelCall:
    """One kernel with what it reads and makes.

    Attributes:
        kernel: The workload.
        operands: For each input of the kernel, a run-time value or an array known now.
        results: For each output of the kernel, the value it holds.
        nodes: Numbers of the nodes it serves.
    """

    kernel: Kernel
    operands: tuple[Operand, ...]
    results: tuple[Value, ...]
    nodes: tuple[int, ...]


@dataclass
class _Selection:
    """State of the selection over one graph."""

    graph: Graph
    static: frozenset[int]
    outputs: frozenset[Value]
    calls: list[KernelCall] = field(default_factory=list[KernelCall])
    served: dict[int, KernelCall] = field(default_factory=dict[int, KernelCall])

    def add(self, kernel: Kernel, operands: Sequence[Operand], results: Sequence[Value], nodes: Sequence[int]) -> None:
        wrapped = tuple(
            Static((operand,)) if isinstance(operand, Value) and operand.node in self.static else operand
            for operand in operands
        )
        call = KernelCall(kernel, wrapped, tuple(results), tuple(nodes))
        self.calls.append(call)
        self.served.update(dict.fromkeys(nodes, call))

    def is_free(self, node: Node) -> bool:
        return node.id not in self.served and node.id not in self.static

    def only_user(self, value: Value) -> Node | None:
        """The one node that reads a value, if nothing else needs it."""
        users = self.graph.users(value)
        return users[0] if len(users) == 1 and value not in self.outputs and self.is_free(users[0]) else None

    def producer(self, value: Value) -> Node:
        return self.graph.node(value.node)


def select(graph: Graph) -> list[KernelCall]:
    """Choose kernels for every live node of an expanded graph.

    Returns:
        Calls in an order in which each reads what earlier ones made.

    Raises:
        CompileError: A node has no kernel.
    """
    state = _Selection(graph, _static_nodes(graph), frozenset(value for _, value in graph.outputs))
    live = [node for node in graph.nodes if node.id in graph.live and node.id not in state.static]
    for node in live:
        if isinstance(node.op, ew.Mul) and state.is_free(node):
            _try_gated_product(state, node)
    for node in live:
        if isinstance(node.op, ct.Matmul) and state.is_free(node) and _is_weight_product(state, node):
            _product(state, node)
    for node in live:
        if state.is_free(node) and type(node.op) in GENERATORS:
            GENERATORS[type(node.op)](state, node)
    _fuse_chains(state, live)
    return [*_in_order(state), *_output_copies(state)]


def aliases(graph: Graph, calls: Sequence[KernelCall]) -> dict[Value, Value]:
    """Values that are another value's memory under another shape: reshapes that no kernel serves."""
    served = {number for call in calls for number in call.nodes}
    found: dict[Value, Value] = {}
    for node in graph.nodes:
        if isinstance(node.op, sh.Reshape) and node.id not in served:
            found[node.results[0]] = found.get(node.operands[0], node.operands[0])
    return found


def _output_copies(state: _Selection) -> list[KernelCall]:
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


# -- products with a weight ------------------------------------------------------------------------------------------


def _is_weight_product(state: _Selection, node: Node) -> bool:
    a, b = node.operands
    rank = state.graph.type_of(b).rank
    assert isinstance(node.op, ct.Matmul)
    return b.node in state.static and rank == 2 and not node.op.transpose_a and a.node not in state.static


def _rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def _product(state: _Selection, node: Node) -> None:
    """One GEMM with as much of what follows as its epilogue takes.

    matmul(x, w) -> add(_, bias) -> gelu -> add(_, residual)  becomes  gemm(x, w, bias, residual)
    """
    assert isinstance(node.op, ct.Matmul)
    nodes, last = [node.id], node.results[0]
    bias, nodes, last = _absorb_bias(state, nodes, last)
    activation, nodes, last = _absorb_activation(state, nodes, last)
    residual, nodes, last = _absorb_residual(state, nodes, last)
    a_type, out = state.graph.type_of(node.operands[0]), state.graph.type_of(last)
    kernel = GemmKernel(
        m=_rows(a_type.shape),
        n=out.shape[-1],
        k=a_type.shape[-1],
        bias=bias is not None,
        activation=activation,
        residual=residual is not None,
    )
    weight = Static((node.operands[1],), node.op.transpose_b)
    extra = [operand for operand in (bias, residual) if operand is not None]
    state.add(kernel, [node.operands[0], weight, *extra], [last], nodes)


def _absorb_bias(state: _Selection, nodes: list[int], last: Value) -> tuple[Static | None, list[int], Value]:
    user = state.only_user(last)
    if user is not None and isinstance(user.op, ew.Add) and user.operands[0] != user.operands[1]:
        other = _other(user, last)
        width = state.graph.type_of(last).shape[-1]
        other_type = state.graph.type_of(other)
        if other.node in state.static and other_type.shape[-1:] == (width,) and other_type.size == width:
            return Static((other,)), [*nodes, user.id], user.results[0]
    return None, nodes, last


def _absorb_activation(state: _Selection, nodes: list[int], last: Value) -> tuple[str | None, list[int], Value]:
    user = state.only_user(last)
    if user is None or type(user.op) not in ACTIVATION_NAMES:
        return None, nodes, last
    name, nodes, last = ACTIVATION_NAMES[type(user.op)], [*nodes, user.id], user.results[0]
    square = state.only_user(last)
    if name == "relu" and square is not None and isinstance(square.op, ew.Square):
        return "relu2", [*nodes, square.id], square.results[0]
    return name, nodes, last


def _absorb_residual(state: _Selection, nodes: list[int], last: Value) -> tuple[Value | None, list[int], Value]:
    user = state.only_user(last)
    if user is not None and isinstance(user.op, ew.Add) and user.operands[0] != user.operands[1]:
        other = _other(user, last)
        if other.node not in state.static and state.graph.type_of(other) == state.graph.type_of(last):
            return other, [*nodes, user.id], user.results[0]
    return None, nodes, last


def _other(node: Node, value: Value) -> Value:
    return node.operands[1] if node.operands[0] == value else node.operands[0]


def _try_gated_product(state: _Selection, node: Node) -> None:
    """Two products of one input whose results are multiplied, one through an activation, as one GEMM.

    mul(silu(matmul(x, g)), matmul(x, u))  becomes  gemm(x, [u | g], gate=silu)
    """
    for gated, plain in (node.operands, node.operands[::-1]):
        activated = state.producer(gated)
        if type(activated.op) not in ACTIVATION_NAMES or state.only_user(gated) is not node:
            continue
        gate = _linear_below(state, activated.operands[0], activated)
        value = _linear_below(state, plain, node)
        if gate is None or value is None or gate.matmul.operands[0] != value.matmul.operands[0]:
            continue
        if gate.matmul.op != value.matmul.op or (gate.bias is None) != (value.bias is None):
            continue
        if gate.matmul.types != value.matmul.types:
            continue  # a narrow gate that is broadcast over the features
        _gated_product(state, node, activated, value, gate)
        return


@dataclass(frozen=True)
class _Linear:
    """A product with a weight, maybe with a bias, read by one node only."""

    matmul: Node
    bias: Value | None
    nodes: tuple[int, ...]


def _linear_below(state: _Selection, value: Value, reader: Node) -> _Linear | None:
    node = state.producer(value)
    if state.only_user(value) is not reader:
        return None
    if isinstance(node.op, ct.Matmul) and state.is_free(node) and _is_weight_product(state, node):
        return _Linear(node, None, (node.id,))
    if isinstance(node.op, ew.Add):
        for product in node.operands:
            below = state.producer(product)
            if isinstance(below.op, ct.Matmul) and state.is_free(below) and _is_weight_product(state, below):
                bias, nodes, _ = _absorb_bias(state, [below.id], product)
                return _Linear(below, bias.values[0], tuple(nodes)) if bias is not None else None
    return None


def _gated_product(state: _Selection, node: Node, activated: Node, value: _Linear, gate: _Linear) -> None:
    assert isinstance(value.matmul.op, ct.Matmul)
    nodes, last = [*value.nodes, *gate.nodes, activated.id, node.id], node.results[0]
    residual, nodes, last = _absorb_residual(state, nodes, last)
    a = value.matmul.operands[0]
    a_type = state.graph.type_of(a)
    kernel = GemmKernel(
        m=_rows(a_type.shape),
        n=node.types[0].shape[-1],
        k=a_type.shape[-1],
        bias=value.bias is not None,
        gate=ACTIVATION_NAMES[type(activated.op)],
        residual=residual is not None,
    )
    operands: list[Operand] = [
        a,
        Static((value.matmul.operands[1], gate.matmul.operands[1]), value.matmul.op.transpose_b),
    ]
    if value.bias is not None and gate.bias is not None:
        operands.append(Static((value.bias, gate.bias)))
    state.add(kernel, [*operands, *([] if residual is None else [residual])], [last], nodes)


# -- operations with a generator -------------------------------------------------------------------------------------


def _attention(state: _Selection, node: Node) -> None:
    op = node.op
    assert isinstance(op, at.Attention)
    q, k, v = (state.graph.type_of(operand).shape for operand in node.operands[:3])
    bias = state.graph.type_of(node.operands[-1]).shape if op.has_bias else None
    kernel = AttentionKernel(
        batch=q[0],
        q_len=q[1],
        kv_len=k[1],
        heads=q[2],
        kv_heads=k[2],
        head_dim=q[3],
        value_dim=v[3],
        scale=op.scale,
        causal=op.causal,
        window=op.window,
        alibi_slopes=op.alibi,
        bias_shape=None if bias is None else (1,) * (4 - len(bias)) + bias,
        offset=op.has_offset,
    )
    state.add(kernel, node.operands, node.results, [node.id])


def _rope(state: _Selection, node: Node) -> None:
    op = node.op
    assert isinstance(op, at.Rope)
    if op.has_offset:
        return  # no table can cover a position that is not known: left to the chains, which compute the angles
    batch, steps, heads, dim = node.types[0].shape
    kernel = RopeKernel(batch=batch, t=steps, heads=heads, dim=dim, base=op.base)
    state.add(kernel, [node.operands[0], Table(Constant.from_array(kernel.table()))], node.results, [node.id])


def _outer_scan(state: _Selection, node: Node) -> None:
    op = node.op
    assert isinstance(op, rc.OuterScan)
    batch, steps, heads, keys = state.graph.type_of(node.operands[0]).shape
    values = state.graph.type_of(node.operands[2]).shape[3]
    wants_state = bool(state.graph.users(node.results[1])) or node.results[1] in state.outputs
    results = node.results if wants_state else node.results[:1]
    if op.decay == "state":
        kernel: Kernel = SelectiveScanKernel(
            batch=batch,
            t=steps,
            channels=values,
            state=keys,
            heads=heads,
            scale=op.scale,
            decaying=_is_decaying(state, gates=node.operands[3], rate=node.operands[4]),
            initial_state=op.has_state,
            final_state=wants_state,
        )
    else:
        kernel = OuterScanKernel(
            batch=batch,
            t=steps,
            heads=heads,
            dk=keys,
            dv=values,
            decay=op.decay,
            scale=op.scale,
            initial_state=op.has_state,
            final_state=wants_state,
        )
    state.add(kernel, node.operands, results, [node.id])


def _is_decaying(state: _Selection, gates: Value, rate: Value) -> bool:
    """Whether every gate * rate is certainly at most zero: a positive function times a negated one."""
    negated = _below_views(state, rate)
    return (
        isinstance(_below_views(state, gates).op, POSITIVE)
        and isinstance(negated.op, ew.Neg)
        and isinstance(_below_views(state, negated.operands[0]).op, POSITIVE)
    )


def _below_views(state: _Selection, value: Value) -> Node:
    """The node that computes a value's elements, whatever their order."""
    node = state.producer(value)
    while isinstance(node.op, sh.Reshape | sh.Transpose | sh.Broadcast | sh.Slice):
        node = state.producer(node.operands[0])
    return node


def _norm(state: _Selection, node: Node) -> None:
    """A norm, with the addition before it if nothing else has taken that.

    layer_norm(add(x, y), scale)  becomes  norm(x, y, scale), which also writes the sum
    """
    op, type_ = node.op, node.types[0]
    assert isinstance(op, nm.LayerNorm | nm.RmsNorm)
    factors = node.operands[1:]
    below = state.producer(node.operands[0])
    fuse = (
        isinstance(below.op, ew.Add)
        and state.is_free(below)
        and _same_run_time_types(state, below)
        and all(factor.node in state.static for factor in factors)  # others may themselves need the sum
    )
    kernel = NormKernel(
        rows=_rows(type_.shape),
        width=type_.shape[-1],
        kind="layer_norm" if isinstance(op, nm.LayerNorm) else "rms_norm",
        epsilon=op.epsilon,
        residual=fuse,
        scale=len(factors) > 0,
        bias=len(factors) > 1,
    )
    if fuse:
        state.add(kernel, [*below.operands, *factors], [node.results[0], below.results[0]], [below.id, node.id])
    else:
        state.add(kernel, node.operands, node.results, [node.id])


def _same_run_time_types(state: _Selection, node: Node) -> bool:
    static = any(operand.node in state.static for operand in node.operands)
    return not static and all(t == node.types[0] for t in state.graph.operand_types(node))


def _softmax(state: _Selection, node: Node) -> None:
    op, shape = node.op, node.types[0].shape
    assert isinstance(op, nm.Softmax)
    if op.axis % len(shape) != len(shape) - 1:
        raise CompileError("softmax is compiled along the last axis only", where=node.path, hint="transpose around it")
    state.add(NormKernel(_rows(shape), shape[-1], "softmax"), node.operands, node.results, [node.id])


def _window(state: _Selection, node: Node) -> None:
    op = node.op
    assert isinstance(op, cv.Conv | cv.Pool)
    types = state.graph.operand_types(node)
    weight = types[1] if isinstance(op, cv.Conv) else None
    state.add(WindowKernel(types[0], weight, op), node.operands, node.results, [node.id])


def _scan(state: _Selection, node: Node) -> None:
    op = node.op
    assert isinstance(op, rc.LinearScan | rd.Cumsum)
    axis = op.axis if isinstance(op, rd.Cumsum) else 1
    kernel = ScanKernel.along(node.types[0].shape, axis, decay=isinstance(op, rc.LinearScan))
    state.add(kernel, node.operands, node.results, [node.id])


def _batch_product(state: _Selection, node: Node) -> None:
    op = node.op
    assert isinstance(op, ct.Matmul)
    a, b = state.graph.operand_types(node)
    a_products, b_products, batch = _rows(a.shape[:-1]), _rows(b.shape[:-1]), _rows(node.types[0].shape[:-1])
    if not {a_products, b_products} <= {1, batch}:
        raise CompileError(
            "a product of run-time operands needs equal leading axes, or one operand for all",
            where=node.path,
            found=f"{a} and {b}",
            hint="broadcast the smaller operand first",
        )
    rows, columns = node.types[0].shape[-2:]
    kernel = BatchGemmKernel(
        batch=batch,
        m=rows,
        n=columns,
        k=a.shape[-2] if op.transpose_a else a.shape[-1],
        transpose_a=op.transpose_a,
        transpose_b=op.transpose_b,
        a_shared=a_products < batch,
        b_shared=b_products < batch,
    )
    state.add(kernel, node.operands, node.results, [node.id])


GENERATORS: Final[dict[type[Op], Callable[[_Selection, Node], None]]] = {
    at.Attention: _attention,
    at.Rope: _rope,
    ct.Matmul: _batch_product,
    cv.Conv: _window,
    cv.Pool: _window,
    nm.LayerNorm: _norm,
    nm.RmsNorm: _norm,
    nm.Softmax: _softmax,
    rc.LinearScan: _scan,
    rc.OuterScan: _outer_scan,
    rd.Cumsum: _scan,
}
"""Operations with a kernel generator of their own."""


# -- chains ----------------------------------------------------------------------------------------------------------


def _fuse_chains(state: _Selection, live: list[Node]) -> None:
    """Group what is left: a node joins the chain of the one node that reads it, unless that would repeat costly work.

    exp(x) -> mul(_, y) -> sum  becomes one kernel
    """
    chains: dict[int, list[Node]] = {}
    home: dict[int, int] = {}
    for node in reversed(live):
        if not state.is_free(node) or isinstance(node.op, Input):
            continue
        if not is_fusible(node.op) and not isinstance(node.op, rd.Reduction):
            raise CompileError("no kernel for this operation", where=node.path, found=node.op.name)
        reader = state.only_user(node.results[0])
        root = home.get(reader.id) if reader is not None else None
        if root is not None and reader is not None and _may_join(state, node, reader, chains[root]):
            chains[root].append(node)
            home[node.id] = root
        elif not isinstance(node.op, sh.Reshape):
            chains[node.id] = [node]
            home[node.id] = node.id
    for root, members in chains.items():
        _add_chain(state, state.graph.node(root), members[::-1])


def _may_join(state: _Selection, node: Node, reader: Node, chain: list[Node]) -> bool:
    if isinstance(node.op, rd.Reduction) or len(chain) >= LARGEST_CHAIN:
        return False
    reads = max(t.size for t in (*reader.types, *state.graph.operand_types(reader)))
    repeats = reader.operands.count(node.results[0]) > 1 or reads > node.types[0].size
    if repeats and any(isinstance(member.op, COSTLY) for member in _upstream_free(state, node)):
        return False
    return not (isinstance(node.op, sh.Reshape) and not state.is_free(state.producer(node.operands[0])))


def _upstream_free(state: _Selection, node: Node) -> list[Node]:
    """The node and the run of nodes below it that would join with it."""
    found, pending = [], [node]
    while pending:
        current = pending.pop()
        found.append(current)
        below = [state.producer(operand) for operand in current.operands]
        pending += [n for n in below if state.is_free(n) and is_fusible(n.op) and not isinstance(n.op, Input)]
    return found


def _add_chain(state: _Selection, root: Node, members: list[Node]) -> None:
    inside = {node.id for node in members}
    nodes: list[Node] = []
    numbers: dict[Value, Value] = {}
    operands: list[Value] = []

    def place(op: Op, reads: tuple[Value, ...], node_types: Any) -> Value:
        made = Node(len(nodes), op, reads, node_types)
        nodes.append(made)
        return made.results[0]

    for node in members:
        for operand in node.operands:
            if operand in numbers or operand.node in inside:
                continue
            producer, kind = state.producer(operand), state.graph.type_of(operand)
            if isinstance(producer.op, Constant) and kind.size == 1:
                numbers[operand] = place(producer.op, (), (kind,))
            else:
                numbers[operand] = place(Input(f"x{len(operands)}", kind), (), (kind,))
                operands.append(operand)
        reads = tuple(numbers[operand] for operand in node.operands)
        numbers[node.results[0]] = place(node.op, reads, node.types)
    chain = Graph(nodes, [("y", numbers[root.results[0]])])
    state.add(FusedKernel(chain), operands, [root.results[0]], [node.id for node in members])


def _in_order(state: _Selection) -> list[KernelCall]:
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
