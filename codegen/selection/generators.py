"""Second round: operations with a kernel generator of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from codegen.kernels.attention import AttentionKernel
from codegen.kernels.batch_gemm import BatchGemmKernel
from codegen.kernels.norm import NormKernel
from codegen.kernels.recurrence import OuterScanKernel
from codegen.kernels.rope import RopeKernel
from codegen.kernels.scan import ScanKernel
from codegen.kernels.softmax import SoftmaxKernel
from codegen.selection.convolutions import take_window
from codegen.selection.mixing import delta_scan, fourier, long_conv, scatter_add, top_k
from codegen.selection.norms import norm
from codegen.selection.state import Selection, Table, row_count
from codegen.selection.state_space import selective_scan
from ir.errors import CompileError
from ir.graph import Node
from ir.op import Op
from ir.ops import attention as at
from ir.ops import contraction as ct
from ir.ops import convolution as cv
from ir.ops import indexing as ix
from ir.ops import normalization as nm
from ir.ops import recurrence as rc
from ir.ops import reduction as rd
from ir.ops import shape as sh
from ir.ops import sorting as so
from ir.ops import spectral as sp
from ir.ops.structure import Constant


def _attention(state: Selection, node: Node) -> None:
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
        precision=op.precision,
        normaliser=op.normaliser,
        shift=op.shift_of(k[1]) if op.normaliser == "sigmoid" else 0.0,
        stretch=op.stretch,
        bias_known=op.has_bias and node.operands[-1].node in state.static,
    )
    state.add(kernel, node.operands, node.results, [node.id])


def _rope(state: Selection, node: Node) -> None:
    op = node.op
    assert isinstance(op, at.Rope)
    if op.has_offset:
        return  # no table can cover a position that is not known: left to the chains, which compute the angles
    batch, steps, heads, dim = node.types[0].shape
    kernel = RopeKernel(batch=batch, t=steps, heads=heads, dim=dim, base=op.base)
    state.add(kernel, [node.operands[0], Table(Constant.from_array(kernel.table()))], node.results, [node.id])


def _outer_scan(state: Selection, node: Node) -> None:
    op = node.op
    assert isinstance(op, rc.OuterScan)
    if op.delta:
        delta_scan(state, node)
        return
    if op.decay == "state":
        selective_scan(state, node)
        return
    batch, steps, heads, keys = state.graph.type_of(node.operands[0]).shape
    values = state.graph.type_of(node.operands[2]).shape[3]
    wants_state = bool(state.graph.users(node.results[1])) or node.results[1] in state.outputs
    results = node.results if wants_state else node.results[:1]
    operands = list(node.operands)
    constant = _constant_decay(state, node) if op.decay == "head" else None
    if constant:
        del operands[3]
    kernel = OuterScanKernel(
        batch=batch,
        t=steps,
        heads=heads,
        dk=keys,
        dv=values,
        decay=op.decay,
        scale=op.scale,
        constant_log_decay=constant,
        initial_state=op.has_state,
        final_state=wants_state,
    )
    state.add(kernel, operands, results, [node.id])


def _constant_decay(state: Selection, node: Node) -> tuple[float, ...] | None:
    """The log decay of each head, if it is the same number at every step."""
    below = state.producer(node.operands[3])
    if not isinstance(below.op, sh.Broadcast):
        return None
    source = state.producer(below.operands[0])
    heads = below.types[0].shape[-1]
    if not isinstance(source.op, Constant) or source.types[0].size != heads or source.types[0].shape[-1:] != (heads,):
        return None
    return tuple(float(number) for number in source.op.evaluate().reshape(-1))


def _softmax(state: Selection, node: Node) -> None:
    op, shape = node.op, node.types[0].shape
    assert isinstance(op, nm.Softmax)
    last = op.axis % len(shape) == len(shape) - 1
    kernel = NormKernel(row_count(shape), shape[-1], "softmax") if last else SoftmaxKernel.along(shape, op.axis)
    state.add(kernel, node.operands, node.results, [node.id])


def _scan(state: Selection, node: Node) -> None:
    op = node.op
    assert isinstance(op, rc.LinearScan | rd.Cumsum)
    axis = op.axis if isinstance(op, rd.Cumsum) else 1
    kernel = ScanKernel.along(node.types[0].shape, axis, decay=isinstance(op, rc.LinearScan))
    state.add(kernel, node.operands, node.results, [node.id])


def _batch_product(state: Selection, node: Node) -> None:
    op = node.op
    assert isinstance(op, ct.Matmul)
    a, b = state.graph.operand_types(node)
    a_products, b_products, batch = (
        row_count(a.shape[:-1]),
        row_count(b.shape[:-1]),
        row_count(node.types[0].shape[:-1]),
    )
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
        precision=op.precision,
    )
    state.add(kernel, node.operands, node.results, [node.id])


GENERATORS: Final[dict[type[Op], Callable[[Selection, Node], None]]] = {
    at.Attention: _attention,
    at.Rope: _rope,
    ct.Matmul: _batch_product,
    cv.Conv: take_window,
    cv.Pool: take_window,
    nm.LayerNorm: norm,
    nm.RmsNorm: norm,
    nm.Softmax: _softmax,
    rc.LinearScan: _scan,
    rc.OuterScan: _outer_scan,
    rd.Cumsum: _scan,
    ix.ScatterAdd: scatter_add,
    so.TopK: top_k,
    sp.Fft: fourier,
    sp.Irfft: fourier,
    sp.LongConv: long_conv,
    sp.Rfft: fourier,
}
"""Operations with a kernel generator of their own."""
