"""First round: products with a known weight, with what follows them as their epilogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from codegen.kernels.gemm import GemmKernel
from codegen.selection.state import Operand, Selection, Static, row_count
from ir.graph import Node, Value
from ir.op import Op
from ir.ops import contraction as ct
from ir.ops import elementwise as ew

ACTIVATION_NAMES: Final[dict[type[Op], str]] = {
    ew.Relu: "relu",
    ew.Gelu: "gelu",
    ew.Silu: "silu",
    ew.Sigmoid: "sigmoid",
    ew.Tanh: "tanh",
    ew.Softplus: "softplus",
}


def is_weight_product(state: Selection, node: Node) -> bool:
    """Whether a product has a run-time left operand and a static matrix on the right."""
    a, b = node.operands
    rank = state.graph.type_of(b).rank
    assert isinstance(node.op, ct.Matmul)
    return b.node in state.static and rank == 2 and not node.op.transpose_a and a.node not in state.static


def take_product(state: Selection, node: Node) -> None:
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
        m=row_count(a_type.shape),
        n=out.shape[-1],
        k=a_type.shape[-1],
        precision=node.op.precision,
        bias=bias is not None,
        activation=activation,
        residual=residual is not None,
    )
    weight = Static((node.operands[1],), node.op.transpose_b)
    extra = [operand for operand in (bias, residual) if operand is not None]
    state.add(kernel, [node.operands[0], weight, *extra], [last], nodes)


def _absorb_bias(state: Selection, nodes: list[int], last: Value) -> tuple[Static | None, list[int], Value]:
    user = state.only_user(last)
    if user is not None and isinstance(user.op, ew.Add) and user.operands[0] != user.operands[1]:
        other = _other(user, last)
        width = state.graph.type_of(last).shape[-1]
        other_type = state.graph.type_of(other)
        if other.node in state.static and other_type.shape[-1:] == (width,) and other_type.size == width:
            return Static((other,)), [*nodes, user.id], user.results[0]
    return None, nodes, last


def _absorb_activation(state: Selection, nodes: list[int], last: Value) -> tuple[str | None, list[int], Value]:
    user = state.only_user(last)
    if user is None or type(user.op) not in ACTIVATION_NAMES:
        return None, nodes, last
    name, nodes, last = ACTIVATION_NAMES[type(user.op)], [*nodes, user.id], user.results[0]
    square = state.only_user(last)
    if name == "relu" and square is not None and isinstance(square.op, ew.Square):
        return "relu2", [*nodes, square.id], square.results[0]
    return name, nodes, last


def _absorb_residual(state: Selection, nodes: list[int], last: Value) -> tuple[Value | None, list[int], Value]:
    user = state.only_user(last)
    if user is not None and isinstance(user.op, ew.Add) and user.operands[0] != user.operands[1]:
        other = _other(user, last)
        if other.node not in state.static and state.graph.type_of(other) == state.graph.type_of(last):
            return other, [*nodes, user.id], user.results[0]
    return None, nodes, last


def _other(node: Node, value: Value) -> Value:
    return node.operands[1] if node.operands[0] == value else node.operands[0]


def take_gated_product(state: Selection, node: Node) -> None:
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


def _linear_below(state: Selection, value: Value, reader: Node) -> _Linear | None:
    node = state.producer(value)
    if state.only_user(value) is not reader:
        return None
    if isinstance(node.op, ct.Matmul) and state.is_free(node) and is_weight_product(state, node):
        return _Linear(node, None, (node.id,))
    if isinstance(node.op, ew.Add):
        for product in node.operands:
            below = state.producer(product)
            if isinstance(below.op, ct.Matmul) and state.is_free(below) and is_weight_product(state, below):
                bias, nodes, _ = _absorb_bias(state, [below.id], product)
                return _Linear(below, bias.values[0], tuple(nodes)) if bias is not None else None
    return None


def _gated_product(state: Selection, node: Node, activated: Node, value: _Linear, gate: _Linear) -> None:
    assert isinstance(value.matmul.op, ct.Matmul)
    nodes, last = [*value.nodes, *gate.nodes, activated.id, node.id], node.results[0]
    residual, nodes, last = _absorb_residual(state, nodes, last)
    a = value.matmul.operands[0]
    a_type = state.graph.type_of(a)
    kernel = GemmKernel(
        m=row_count(a_type.shape),
        n=node.types[0].shape[-1],
        k=a_type.shape[-1],
        precision=value.matmul.op.precision,
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
