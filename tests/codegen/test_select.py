"""Which kernels serve small graphs: before, a graph; after, the list of kernel keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from codegen import lower
from codegen.selection.select import aliases, select
from codegen.selection.state import KernelCall, Static, Table
from ir.builder import Builder, Tensor
from ir.errors import CompileError
from ir.graph import Graph
from ir.ops.convolution import Pool
from ir.types import Axis

X = (2, 3, 8)


def weight(b: Builder, name: str, *sizes: int) -> Tensor:
    """A parameter."""
    return b.parameter(name, tuple((Axis(f"axis{index}", size),) for index, size in enumerate(sizes)))


def keys(graph: Graph) -> list[str]:
    """Kernel keys, the digests of chains left out."""
    return [re.sub(r",[0-9a-f]{16}\)", ")", call.kernel.key) for call in select(graph)]


def selected(make: Callable[[Builder, Tensor], Tensor | tuple[Tensor, ...]], shape: tuple[int, ...] = X) -> list[str]:
    """Keys of `make(b, x)`."""
    b = Builder()
    made = make(b, b.input("x", shape))
    outputs = made if isinstance(made, tuple) else (made,)
    return keys(b.build(**{f"y{index}": output for index, output in enumerate(outputs)}))


def ffn(b: Builder, x: Tensor) -> Tensor:
    """Bias, activation and residual around two products."""
    hidden = b.gelu(b.matmul(x, weight(b, "up", 8, 16)) + weight(b, "up_bias", 16))
    return b.matmul(hidden, weight(b, "down", 16, 8)) + weight(b, "down_bias", 8) + x


def test_product_takes_bias_activation_and_residual() -> None:
    """What follows a product with a weight becomes its epilogue."""
    assert selected(ffn) == [
        "gemm(m=6,n=16,k=8,bias,activation=gelu)",
        "gemm(m=6,n=8,k=16,bias,residual)",
    ]


def test_product_takes_squared_relu_as_one_activation() -> None:
    """square(relu(x w)) is the activation relu2; the square of another function is not."""
    assert selected(lambda b, x: b.square(b.relu(b.matmul(x, weight(b, "w", 8, 5))))) == [
        "gemm(m=6,n=5,k=8,activation=relu2)"
    ]
    assert selected(lambda b, x: b.square(b.silu(b.matmul(x, weight(b, "w", 8, 5))))) == [
        "gemm(m=6,n=5,k=8,activation=silu)",
        "fused(square)",
    ]


def glu(b: Builder, x: Tensor, gate_width: int = 6) -> Tensor:
    """A gated unit with biases."""
    gate = b.matmul(x, weight(b, "gate", 8, gate_width)) + weight(b, "gate_bias", gate_width)
    return b.silu(gate) * (b.matmul(x, weight(b, "up", 8, 6)) + weight(b, "up_bias", 6))


def test_two_products_of_one_input_become_a_gated_one() -> None:
    """Either order of the factors; the weights lie side by side, the value first."""
    assert selected(glu) == ["gemm(m=6,n=6,k=8,bias,gate=silu)"]
    assert selected(lambda b, x: b.matmul(x, weight(b, "u", 8, 6)) * b.gelu(b.matmul(x, weight(b, "g", 8, 6)))) == [
        "gemm(m=6,n=6,k=8,gate=gelu)"
    ]
    b = Builder()
    graph = b.build(y=glu(b, b.input("x", X)))
    (call,) = select(graph)
    packed = call.operands[1]
    assert isinstance(packed, Static)
    assert packed.values == (graph.parameters["up"].results[0], graph.parameters["gate"].results[0])


def test_gates_that_do_not_match_stay_apart() -> None:
    """Another input, a bias on one side only, a narrow gate, and a gate that is read again are no gated product."""
    narrow = selected(lambda b, x: b.sigmoid(b.matmul(x, weight(b, "g", 8, 1))) * b.matmul(x, weight(b, "u", 8, 6)))
    assert narrow == ["gemm(m=6,n=1,k=8,activation=sigmoid)", "gemm(m=6,n=6,k=8)", "fused(mul)"]
    other = selected(lambda b, x: b.silu(b.matmul(b.exp(x), weight(b, "g", 8, 6))) * b.matmul(x, weight(b, "u", 8, 6)))
    assert other == ["fused(exp)", "gemm(m=6,n=6,k=8,activation=silu)", "gemm(m=6,n=6,k=8)", "fused(mul)"]

    def biased(b: Builder, x: Tensor) -> Tensor:
        gate = b.matmul(x, weight(b, "g", 8, 6)) + weight(b, "bias", 6)
        return b.silu(gate) * b.matmul(x, weight(b, "u", 8, 6))

    assert selected(biased) == ["gemm(m=6,n=6,k=8,bias,activation=silu)", "gemm(m=6,n=6,k=8)", "fused(mul)"]

    def read_again(b: Builder, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = b.silu(b.matmul(x, weight(b, "g", 8, 6)))
        return gate * b.matmul(x, weight(b, "u", 8, 6)), gate

    assert selected(read_again) == ["gemm(m=6,n=6,k=8,activation=silu)", "gemm(m=6,n=6,k=8)", "fused(mul)"]


def test_value_read_twice_is_not_absorbed() -> None:
    """A product whose result is read twice, or is an output, keeps it."""

    def twice(b: Builder, x: Tensor) -> Tensor:
        h = b.matmul(x, weight(b, "w", 8, 8))
        return b.gelu(h) * b.sigmoid(h)

    assert selected(twice) == ["gemm(m=6,n=8,k=8)", "fused(gelu-sigmoid-mul)"]

    def output(b: Builder, x: Tensor) -> tuple[Tensor, Tensor]:
        h = b.matmul(x, weight(b, "w", 8, 8))
        return h, b.gelu(h)

    assert selected(output) == ["gemm(m=6,n=8,k=8)", "fused(gelu)"]


def test_two_products_added_make_no_cycle() -> None:
    """One of two products takes the other as its residual, also where two sums cross."""
    assert selected(lambda b, x: b.matmul(x, weight(b, "v", 8, 8)) + b.matmul(x, weight(b, "w", 8, 8))) == [
        "gemm(m=6,n=8,k=8)",
        "gemm(m=6,n=8,k=8,residual)",
    ]

    def crossed(b: Builder, x: Tensor) -> Tensor:
        first = b.matmul(x, weight(b, "a", 8, 8)) + b.matmul(x, weight(b, "b", 8, 8))
        second = b.matmul(first, weight(b, "c", 8, 8)) + b.matmul(x, weight(b, "d", 8, 8))
        return second + first

    assert selected(crossed) == [
        "gemm(m=6,n=8,k=8)",
        "gemm(m=6,n=8,k=8,residual)",
        "gemm(m=6,n=8,k=8)",
        "gemm(m=6,n=8,k=8,residual)",
        "fused(add)",
    ]
    assert selected(lambda b, x: (h := b.matmul(x, weight(b, "w", 8, 8))) + h) == ["gemm(m=6,n=8,k=8)", "fused(add)"]


def test_norm_takes_the_addition_before_it() -> None:
    """The sum is written too, for whoever reads it; a second norm of the same sum finds it there."""

    def block(b: Builder, x: Tensor) -> Tensor:
        s = x + b.exp(x)
        return b.layer_norm(s, weight(b, "scale", 8)) * b.rms_norm(s) + s

    assert selected(block) == [
        "fused(exp)",
        "norm(rows=6,width=8,kind=layer_norm,epsilon=1e-05,residual,scale)",
        "norm(rows=6,width=8,kind=rms_norm,epsilon=1e-05,gate=identity)",
        "fused(add)",
    ]


def test_norm_leaves_other_additions_alone() -> None:
    """A bias is no residual, nor is a sum that the factors are made of: that would be a cycle."""
    assert selected(lambda b, x: b.rms_norm(x + weight(b, "bias", 8))) == [
        "fused(add)",
        "norm(rows=6,width=8,kind=rms_norm,epsilon=1e-05)",
    ]

    def adaptive(b: Builder, x: Tensor) -> Tensor:
        s = x + b.exp(x)
        return b.layer_norm(s, b.sum(s, 0, 1))

    assert selected(adaptive) == [
        "fused(exp-add)",
        "fused(sum)",
        "norm(rows=6,width=8,kind=layer_norm,epsilon=1e-05,scale)",
    ]


def test_reshapes_are_other_names_of_the_same_memory() -> None:
    """A reshape between kernels costs nothing; inside a chain it is part of the chain."""

    def heads(b: Builder, x: Tensor) -> Tensor:
        q = b.split_heads(b.matmul(x, weight(b, "q", 8, 8)), 2)
        return b.merge_heads(b.attention(q, q, q, scale=1.0))

    assert selected(heads) == [
        "gemm(m=6,n=8,k=8)",
        "attention(batch=2,q_len=3,kv_len=3,heads=2,kv_heads=2,head_dim=4,value_dim=4,scale=1)",
    ]
    b = Builder()
    graph = b.build(y=heads(b, b.input("x", X)))
    calls = select(graph)
    alias = aliases(graph, calls)
    assert alias[graph.outputs[0][1]] == calls[-1].results[0]
    inside = selected(lambda b, x: b.sum(b.reshape(b.exp(x), 2, 12, 2) * b.input("z", (2, 12, 2)), -1))
    assert inside == ["fused(exp-reshape-mul-sum)"]


def test_costly_operation_is_not_repeated_under_a_broadcast() -> None:
    """A gate of one number a row is computed once; cheap arithmetic may be computed again."""

    def gate(b: Builder, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return x * function(b.input("gate", (2, 3, 1)))

    assert selected(lambda b, x: gate(b, x, b.sigmoid)) == ["fused(sigmoid)", "fused(mul)"]
    assert selected(lambda b, x: gate(b, x, lambda g: g * 2.0 + 1.0)) == ["fused(mul-add-mul)"]
    assert selected(lambda b, x: x * b.broadcast(b.exp(b.input("g", (3, 1))), 2, 3, 8)) == [
        "fused(exp)",
        "fused(broadcast-mul)",
    ]


def test_chain_ends_at_a_reduction_and_at_many_readers() -> None:
    """A reduction is the last step of its chain, and a value with two readers is stored."""
    assert selected(lambda b, x: b.exp(b.sum(b.exp(x), -1, keepdims=True))) == ["fused(exp-sum)", "fused(exp)"]
    assert selected(lambda b, x: b.sum(h := b.exp(x), 1, keepdims=True) + h) == [
        "fused(exp)",
        "fused(sum)",
        "fused(add)",
    ]


def test_long_chains_are_cut() -> None:
    """Forty steps become two kernels, not one expression."""

    def steps(b: Builder, x: Tensor) -> Tensor:
        for _ in range(40):
            x = b.relu(x)
        return x

    found = [call.nodes for call in select(_graph(steps))]
    assert [len(nodes) for nodes in found] == [16, 24]


def _graph(make: Callable[[Builder, Tensor], Tensor]) -> Graph:
    b = Builder()
    return b.build(y=make(b, b.input("x", X)))


def test_transposed_weight_is_turned_when_it_is_packed() -> None:
    """A tied embedding is a table for the lookup and a transposed weight for the head."""
    b = Builder()
    table = weight(b, "embedding", 11, 8)
    h = b.take(table, b.input("tokens", (2, 3), "int32"))
    graph = b.build(y=b.matmul(b.exp(h), table, transpose_b=True))
    assert keys(graph) == ["fused(take-exp)", "gemm(m=6,n=11,k=8)"]
    first, second = select(graph)
    value = graph.parameters["embedding"].results[0]
    assert first.operands[0] == Static((value,))
    assert second.operands[1] == Static((value,), transpose=True)


def test_expression_of_parameters_is_static() -> None:
    """What depends on parameters alone is computed when the model is compiled, whatever the operation."""

    def decay(b: Builder, x: Tensor) -> Tensor:
        return x * -b.exp(b.softmax(weight(b, "a_log", 8)))

    assert selected(decay) == ["fused(mul)"]


def test_product_of_run_time_operands() -> None:
    """Both operands may come from the input; one may serve all products, but neither may serve some of them."""

    def scores(b: Builder, x: Tensor) -> Tensor:
        return b.matmul(b.matmul(x, x, transpose_b=True), x)

    assert selected(scores) == ["batch_gemm(batch=2,m=3,n=3,k=8,transpose_b)", "batch_gemm(batch=2,m=3,n=8,k=3)"]
    assert selected(lambda b, x: b.matmul(weight(b, "w", 5, 3), x)) == ["batch_gemm(batch=2,m=5,n=8,k=3,a_shared)"]
    assert selected(lambda b, x: b.matmul(x, b.exp(b.input("z", (1, 8, 4))))) == [
        "fused(exp)",
        "batch_gemm(batch=2,m=3,n=4,k=8,b_shared)",
    ]
    with pytest.raises(CompileError, match="equal leading axes") as error:
        selected(lambda b, x: b.matmul(b.input("z", (4, 1, 5, 3)), x))
    assert "broadcast" in str(error.value)


def test_rope_reads_a_table_unless_the_position_is_data() -> None:
    """A known position is looked up, one that arrives with the call is computed."""
    b = Builder()
    x = b.input("x", (1, 3, 2, 4))
    graph = b.build(y=b.rope(x), z=b.rope(x, offset=b.input("position", (), "int32")))
    assert keys(graph) == ["rope(batch=1,t=3,heads=2,dim=4)", "fused(rope)"]
    assert any(isinstance(operand, Table) for call in select(graph) for operand in call.operands)


def test_last_state_is_made_only_where_it_is_read() -> None:
    """A recurrence whose last state nobody reads does not write it."""

    def scan(b: Builder, x: Tensor) -> tuple[Tensor, Tensor]:
        q = b.split_heads(x, 2)
        return b.outer_scan(q, q, q)

    assert "final_state" not in selected(lambda b, x: scan(b, x)[0])[0]
    assert "final_state" in selected(lambda b, x: scan(b, x))[0]
    assert "final_state" in selected(lambda b, x: scan(b, x)[1])[0]


def test_delta_rule_has_its_own_scan() -> None:
    """Betas make the recurrence the delta rule; its last state is written only where it is read."""

    def scan(b: Builder, x: Tensor) -> tuple[Tensor, Tensor]:
        q = b.split_heads(x, 2)
        return b.outer_scan(q, q, q, b.input("g", (2, 3, 2)), decay="head", beta=b.input("beta", (2, 3, 2)))

    assert selected(lambda b, x: scan(b, x)[0]) == ["delta_scan(batch=2,t=3,heads=2,dk=4,dv=4,decay=head)"]
    assert selected(scan) == ["delta_scan(batch=2,t=3,heads=2,dk=4,dv=4,decay=head,final_state)"]


def test_output_that_no_kernel_makes_is_copied() -> None:
    """Inputs and static values that are outputs, reshaped or not, get one copy each."""

    def passed_through(b: Builder, x: Tensor) -> tuple[Tensor, ...]:
        return x, b.reshape(x, 6, 8), weight(b, "w", 3), b.constant(np.ones((2, 2))), b.exp(weight(b, "v", 3))

    assert selected(passed_through) == ["fused(copy)"] * 4
    assert selected(lambda b, x: (b.exp(x), x)) == ["fused(exp)", "fused(copy)"]
    assert selected(lambda b, x: ((h := b.exp(x)), b.reshape(h, 6, 8), h)) == ["fused(exp)"]


def test_dead_nodes_get_no_kernel() -> None:
    """What no output needs is not served, even where nothing could serve it."""
    assert selected(lambda b, x: (b.softmax(x, 0), b.exp(x))[1]) == ["fused(exp)"]


def test_softmax_along_another_axis_has_its_own_kernel() -> None:
    """Nothing is transposed around it."""
    assert selected(lambda b, x: b.softmax(x, 1))[0].startswith("softmax(")
    assert selected(lambda b, x: b.softmax(x, -1))[0].startswith("norm(")


def test_turned_image_is_one_copy() -> None:
    """Both concatenations of a cyclic shift along two axes are one chain, though slices read the first one twice."""

    def turned(b: Builder, x: Tensor) -> Tensor:
        for axis in (0, 1):
            x = b.concat(axis, b.slice(x, axis, 1, x.shape[axis]), b.slice(x, axis, 0, 1))
        return x

    assert [key.split("(")[0] for key in selected(turned)] == ["fused"]


def test_computed_value_read_twice_is_stored() -> None:
    """Arithmetic is not repeated for the sake of one chain; only moves are."""
    keys = selected(lambda b, x: (h := x * 2.0, b.concat(0, b.slice(h, 0, 1, 2), b.slice(h, 0, 0, 1)))[1])
    assert keys == ["fused(mul)", "fused(slice-slice-concat)"]


def test_operation_without_a_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the node with its scope, and the operation."""
    b = Builder()
    x = b.input("x", X)
    with b.scope("layers.0.mixer"):
        graph = b.build(y=b.cumsum(x, 1))
    generators = {op: row for op, row in select.__globals__["GENERATORS"].items() if op.name != "cumsum"}
    monkeypatch.setattr("codegen.selection.select.GENERATORS", generators)
    with pytest.raises(CompileError) as error:
        select(graph)
    assert str(error.value) == "layers.0.mixer/cumsum_1: no kernel for this operation\n  found: cumsum"


def every_live_node_once(graph: Graph, calls: list[KernelCall]) -> bool:
    """Whether no node is served twice and each call reads only what earlier ones made."""
    alias = aliases(graph, calls)
    known = {node.results[0] for node in graph.inputs.values()}
    for call in calls:
        reads = [operand for operand in call.operands if not isinstance(operand, Static | Table)]
        if not all(alias.get(value, value) in known for value in reads):
            return False
        known.update(call.results)
    served = [number for call in calls for number in call.nodes]
    return len(served) == len(set(served)) and all(alias.get(v, v) in known for _, v in graph.outputs)


def decoder_layer(b: Builder, x: Tensor) -> Tensor:
    """Attention and a gated unit around two norms."""
    with b.scope("mixer"):
        h = b.rms_norm(x, weight(b, "scale", 8))
        q, k, v = (b.split_heads(b.matmul(h, weight(b, name, 8, 8)), 2) for name in "qkv")
        y = b.merge_heads(b.attention(b.rope(q), b.rope(k), v, causal=True))
        x = x + b.matmul(y, weight(b, "o", 8, 8))
    with b.scope("channel"):
        h = b.rms_norm(x, weight(b, "scale", 8))
        h = b.silu(b.matmul(h, weight(b, "g", 8, 16))) * b.matmul(h, weight(b, "u", 8, 16))
        return x + b.matmul(h, weight(b, "d", 16, 8))


def test_decoder_layer_kernels(golden: Callable[[str, str], None]) -> None:
    """A whole decoder layer, as `nas show --kernels` would list it."""
    b = Builder()
    x = b.input("x", X)
    conv = b.conv(x, weight(b, "conv", 4, 1, 8), padding=((3, 0),), groups=8)
    pooled = b.pool(b.silu(conv), Pool("average", (3,), (1,), ((2, 0),)))
    graph = lower.simplify(b.build(y=b.softmax(decoder_layer(b, pooled))))
    calls = select(graph)
    assert every_live_node_once(graph, calls)
    lines: list[Any] = [
        f"{re.sub(',[0-9a-f]{16}', '', call.kernel.key)} <- {' '.join(graph.node(n).path for n in call.nodes)}"
        for call in calls
    ]
    golden("codegen/decoder_layer_kernels.txt", "\n".join(lines))
