"""Any graph as a trainable `torch.nn.Module`: one row of `TORCH` for each operation.

Parameters keep their names: `layers.3.mixer.q` of the graph is `layers.3.mixer.q` of the module's state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegen.torch_scan import outer_scan, scan_first_axis
from ir.errors import GraphError
from ir.graph import Graph, Node, Value
from ir.initializers import Params, initialize
from ir.op import Op
from ir.ops import attention as at
from ir.ops import contraction as ct
from ir.ops import convolution as cv
from ir.ops import elementwise as ew
from ir.ops import indexing as ix
from ir.ops import normalization as nm
from ir.ops import recurrence as rc
from ir.ops import reduction as rd
from ir.ops import shape as sh
from ir.ops import sorting as so
from ir.ops import spectral as sp
from ir.ops.structure import Constant, Input, Parameter
from ir.passes.unroll_loops import UnrollLoops
from ir.types import TensorType

Row = Callable[..., Tensor | tuple[Tensor, ...]]
DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "bool": torch.bool,
}


def _attention(op: at.Attention, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    if op.precision == "bfloat16":  # the weights stay float32: their rounding is the smallest of the four
        q, k, v = (x.to(torch.bfloat16).to(x.dtype) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if _plain_causal(op, q.shape[2], k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=op.scale).transpose(1, 2)
    mask: Tensor | None = None
    if op.has_offset:
        mask = _mask(op, rest[0] + torch.arange(q.shape[2], device=q.device), k.shape[2], q.dtype)
    elif _masks(op):
        mask, rest = rest[-1], rest[:-1]
    if op.has_bias:
        bias = torch.atleast_2d(rest[-1])  # torch refuses masks of fewer axes
        mask = bias if mask is None else bias + mask
    if op.normaliser != "softmax":
        return torch.matmul(_weigh(op, torch.matmul(q, k.mT) * op.scale, mask), v).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=op.scale)
    if mask is not None:
        out = out * (mask > -torch.inf).any(-1, keepdim=True)
    return out.transpose(1, 2)


def _weigh(op: at.Attention, scores: Tensor, mask: Tensor | None) -> Tensor:
    """Weights that are no softmax; the mask is minus infinity where hidden."""
    if mask is not None:
        scores = scores + mask
    if op.normaliser == "sigmoid":
        return torch.sigmoid(scores + op.shift_of(scores.shape[-1]))
    low, high = op.stretch
    seen = scores > -torch.inf
    weights = torch.softmax(torch.where(seen, scores, torch.finfo(scores.dtype).min), dim=-1)
    return torch.clamp((high - low) * weights + low, 0.0, 1.0) * seen


def _masks(op: at.Attention) -> bool:
    return op.causal or op.window is not None or op.alibi is not None


def _plain_causal(op: at.Attention, queries: int, keys: int) -> bool:
    """Whether torch's own causal flag says it all."""
    narrow = op.window is not None and op.window < keys
    special = narrow or op.alibi or op.has_bias or op.has_offset or op.normaliser != "softmax"
    return op.causal and queries == keys and not special


def _mask(op: at.Attention, positions: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """Additive scores `[H or 1, T, S]`: minus infinity where hidden, the alibi slope times distance elsewhere."""
    distance = positions.unsqueeze(-1) - torch.arange(keys, device=positions.device)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if op.causal:
        hidden |= distance < 0
    if op.window is not None:
        hidden |= distance.abs() >= op.window
    bias = torch.zeros(distance.shape, dtype=dtype, device=positions.device).unsqueeze(0)
    if op.alibi is not None:
        slopes = torch.tensor(op.alibi, dtype=dtype, device=positions.device)
        bias = -slopes[:, None, None] * distance.abs()
    return bias.masked_fill(hidden, -torch.inf)


def _attention_tables(op: at.Attention, operands: tuple[TensorType, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    queries, keys = operands[0].shape[1], operands[1].shape[1]
    if op.has_offset or not _masks(op) or _plain_causal(op, queries, keys):
        return ()
    return (_mask(op, keys - queries + torch.arange(queries), keys, dtype),)


def _rope(op: at.Rope, x: Tensor, *rest: Tensor) -> Tensor:
    cos, sin = _angles(op, x.shape, rest[0], x.dtype) if op.has_offset else rest
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _angles(
    op: at.Rope, shape: torch.Size | tuple[int, ...], offset: Tensor | int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, 1, K / 2]`, computed in float64."""
    half = shape[3] // 2
    position = (offset + torch.arange(shape[1])).to(torch.float64)
    angle = position[:, None] * op.base ** (-torch.arange(half, dtype=torch.float64) / half)
    return angle.cos().to(dtype).unsqueeze(1), angle.sin().to(dtype).unsqueeze(1)


def _rope_tables(op: at.Rope, operands: tuple[TensorType, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return () if op.has_offset else _angles(op, operands[0].shape, 0, dtype)


def _conv(op: cv.Conv, x: Tensor, weight: Tensor) -> Tensor:
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    padded = _pad_spatial(x.movedim(-1, 1), op.padding, 0.0)
    kernel = weight.movedim((-1, -2), (0, 1))
    return function(padded, kernel, None, op.strides, 0, op.dilation, op.groups).movedim(1, -1)


def _pad_spatial(x: Tensor, padding: cv.Padding, value: float) -> Tensor:
    """Pad `[B, C, *S]`; torch lists the last axis first."""
    flat = [side for pair in reversed(padding) for side in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _pool(op: cv.Pool, x: Tensor) -> Tensor:
    x = x.movedim(-1, 1)
    axes = x.ndim - 2
    if op.kind == "max":
        function = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[axes]
        return function(_pad_spatial(x, op.padding, -torch.inf), op.window, op.strides).movedim(1, -1)
    average = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[axes]
    pooled = average(_pad_spatial(x, op.padding, 0.0), op.window, op.strides)
    if not op.count_padding:
        inside = _pad_spatial(torch.ones_like(x[:1, :1]), op.padding, 0.0)
        pooled = pooled / average(inside, op.window, op.strides)
    return pooled.movedim(1, -1)


def _matmul(op: ct.Matmul, a: Tensor, b: Tensor) -> Tensor:
    if op.precision == "bfloat16":
        a, b = (operand.float().bfloat16().to(operand.dtype) for operand in (a, b))
    return torch.matmul(a.mT if op.transpose_a else a, b.mT if op.transpose_b else b)


def _dynamic_update(op: ix.DynamicUpdate, base: Tensor, update: Tensor, position: Tensor) -> Tensor:
    index = position + torch.arange(update.shape[op.axis], device=base.device)
    return base.index_copy(op.axis, index.to(torch.int64), update)


def _gather(op: ix.Gather, x: Tensor, indices: Tensor) -> Tensor:
    axis = op.axis % x.ndim
    shape = (*x.shape[:axis], indices.shape[axis], *x.shape[axis + 1 :])
    return x.gather(axis, indices.expand(shape).to(torch.int64))


def _top_k(op: so.TopK, x: Tensor) -> tuple[Tensor, Tensor]:
    values, order = x.sort(dim=-1, descending=op.largest, stable=True)
    return values[..., : op.k], order[..., : op.k].to(torch.int32)


def _fft(op: sp.Fft, real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
    result = (torch.fft.ifft if op.inverse else torch.fft.fft)(torch.complex(real, imaginary), dim=op.axis)
    return result.real, result.imag


def _rfft(op: sp.Rfft, x: Tensor) -> tuple[Tensor, Tensor]:
    result = torch.fft.rfft(x, dim=op.axis)
    return result.real, result.imag


def _irfft(op: sp.Irfft, real: Tensor, imaginary: Tensor) -> Tensor:
    return torch.fft.irfft(torch.complex(real, imaginary), n=op.length, dim=op.axis)


def _long_conv(op: sp.LongConv, x: Tensor, filter: Tensor) -> Tensor:
    steps, padded = x.shape[1], x.shape[1] + filter.shape[0] - 1
    spectrum = torch.fft.rfft(x, padded, dim=1) * torch.fft.rfft(filter, padded, dim=0)
    return torch.fft.irfft(spectrum, padded, dim=1)[:, :steps]


def _slice(op: sh.Slice, x: Tensor) -> Tensor:
    return x[(slice(None),) * (op.axis % x.ndim) + (slice(op.start, op.stop, op.stride),)]


def _pad(op: sh.Pad, x: Tensor) -> Tensor:
    flat = [side for pair in zip(reversed(op.low), reversed(op.high), strict=True) for side in pair]
    return F.pad(x, flat, value=op.value)


def _linear_scan(op: rc.LinearScan, a: Tensor, b: Tensor) -> Tensor:
    return scan_first_axis(a.transpose(0, 1), b.transpose(0, 1).contiguous()).transpose(0, 1)


def _layer_norm(op: nm.LayerNorm, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], scale, bias, op.epsilon)


def _rms_norm(op: nm.RmsNorm, x: Tensor, scale: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], scale, op.epsilon)


def _batch_norm(op: nm.BatchNorm, x: Tensor, *factors: Tensor, training: bool = False) -> Tensor:
    scale, bias, mean, variance = factors
    rows = x.reshape(-1, x.shape[-1])
    y = F.batch_norm(rows, mean, variance, scale, bias, training, op.momentum, op.epsilon)
    return y.reshape(x.shape)


def _plain(function: Callable[..., Tensor]) -> Row:
    """A row for an operation without attributes."""
    return lambda op, *operands: function(*operands)


TORCH: Final[dict[type[Op], Row]] = {
    ew.Neg: _plain(torch.neg),
    ew.Exp: _plain(torch.exp),
    ew.Log: _plain(torch.log),
    ew.Sqrt: _plain(torch.sqrt),
    ew.Rsqrt: _plain(torch.rsqrt),
    ew.Abs: _plain(torch.abs),
    ew.Sin: _plain(torch.sin),
    ew.Cos: _plain(torch.cos),
    ew.Tanh: _plain(torch.tanh),
    ew.Erf: _plain(torch.erf),
    ew.Sigmoid: _plain(torch.sigmoid),
    ew.Relu: _plain(torch.relu),
    ew.Silu: _plain(F.silu),
    ew.Gelu: _plain(F.gelu),
    ew.Softplus: _plain(F.softplus),
    ew.Square: _plain(torch.square),
    ew.Add: _plain(torch.add),
    ew.Sub: _plain(torch.sub),
    ew.Mul: _plain(torch.mul),
    ew.Div: _plain(torch.div),
    ew.Maximum: _plain(torch.maximum),
    ew.Minimum: _plain(torch.minimum),
    ew.Pow: _plain(torch.pow),
    ew.Compare: lambda op, a, b: {"lt": torch.lt, "le": torch.le, "eq": torch.eq}[op.kind](a, b),
    ew.Where: _plain(torch.where),
    ew.Cast: lambda op, x: x.to(DTYPES[op.dtype]),
    rd.Sum: lambda op, x: x.sum(op.axes, op.keepdims),
    rd.Mean: lambda op, x: x.mean(op.axes, op.keepdims),
    rd.Max: lambda op, x: x.amax(op.axes, op.keepdims),
    rd.Cumsum: lambda op, x: x.cumsum(op.axis),
    sh.Reshape: lambda op, x: x.reshape(op.shape),
    sh.Transpose: lambda op, x: x.permute(op.permutation),
    sh.Slice: _slice,
    sh.Concat: lambda op, *parts: torch.cat(parts, op.axis),
    sh.Pad: _pad,
    sh.Broadcast: lambda op, x: x.expand(op.shape),
    ix.Take: lambda op, table, indices: F.embedding(indices, table) if table.ndim == 2 else table[indices],
    ix.DynamicUpdate: _dynamic_update,
    ix.Gather: _gather,
    ix.ScatterAdd: lambda op, x, i, u: x.scatter_add(op.axis, i.expand(u.shape).to(torch.int64), u),
    so.TopK: _top_k,
    sp.Fft: _fft,
    sp.Rfft: _rfft,
    sp.Irfft: _irfft,
    sp.LongConv: _long_conv,
    ct.Matmul: _matmul,
    cv.Conv: _conv,
    cv.Pool: _pool,
    nm.Softmax: lambda op, x: x.softmax(op.axis),
    nm.LayerNorm: _layer_norm,
    nm.RmsNorm: _rms_norm,
    nm.BatchNorm: _batch_norm,
    at.Attention: _attention,
    at.Rope: _rope,
    rc.LinearScan: _linear_scan,
    rc.OuterScan: outer_scan,
}
"""The torch row of each operation: the operation, then its operands."""

TABLES: Final[dict[type[Op], Callable[..., tuple[Tensor, ...]]]] = {
    at.Attention: _attention_tables,
    at.Rope: _rope_tables,
}
"""Tensors known when the module is built, passed to the row after the operands."""


class GraphModule(nn.Module):
    """A graph as a module; made by `to_module`.

    `forward` takes the graph's inputs by name and returns its outputs by name.
    """

    def __init__(self, graph: Graph, params: Mapping[str, np.ndarray], dtype: torch.dtype) -> None:
        super().__init__()
        self.input_names = tuple(graph.inputs)
        self.output_slots = tuple((name, value) for name, value in graph.outputs)
        self._homes: list[tuple[Value, nn.Module, str]] = []
        self._buffer_slots: list[tuple[Value, str]] = []
        self._steps: list[tuple[Row, Op, tuple[Value, ...], tuple[str, ...], tuple[Value, ...]]] = []
        self._input_slots: dict[str, Value] = {}
        for node in graph.nodes:
            if node.id in graph.live or isinstance(node.op, Input | Parameter):
                self._add(graph, node, params, dtype)

    def _add(self, graph: Graph, node: Node, params: Mapping[str, np.ndarray], dtype: torch.dtype) -> None:
        match node.op:
            case Input():
                self._input_slots[node.op.label] = node.results[0]
            case Parameter():
                self._add_parameter(node, params[node.op.label], dtype)
            case Constant():
                array = torch.from_numpy(node.op.evaluate().copy())
                name = self._add_buffer(f"constant_{node.id}", array.to(dtype) if array.is_floating_point() else array)
                self._buffer_slots.append((node.results[0], name))
            case _:
                self._add_step(graph, node, dtype)

    def _add_parameter(self, node: Node, array: np.ndarray, dtype: torch.dtype) -> None:
        assert isinstance(node.op, Parameter)
        *path, name = node.op.label.split(".")
        home: nn.Module = self
        for part in path:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home.get_submodule(part)
        tensor = torch.tensor(array, dtype=dtype)
        if node.op.trained:
            home.register_parameter(name, nn.Parameter(tensor))
        else:
            home.register_buffer(name, tensor)
        self._homes.append((node.results[0], home, name))

    def _add_buffer(self, name: str, tensor: Tensor) -> str:
        self.register_buffer(name, tensor, persistent=False)
        return name

    def _add_step(self, graph: Graph, node: Node, dtype: torch.dtype) -> None:
        if type(node.op) not in TORCH:
            raise GraphError("no torch row for this operation", where=node.path, hint="expand components first")
        make_tables = TABLES.get(type(node.op))
        tables = make_tables(node.op, graph.operand_types(node), dtype) if make_tables else ()
        names = tuple(self._add_buffer(f"table_{node.id}_{index}", table) for index, table in enumerate(tables))
        self._steps.append((TORCH[type(node.op)], node.op, node.operands, names, node.results))

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Evaluate the graph.

        Args:
            inputs: A tensor for each input, by name.

        Returns:
            A tensor for each output, by name.
        """
        values: dict[Value, Tensor] = {slot: inputs[name] for name, slot in self._input_slots.items()}
        for slot, home, name in self._homes:
            values[slot] = getattr(home, name)
        for slot, name in self._buffer_slots:
            values[slot] = self._buffers[name]  # type: ignore[assignment]
        for row, op, operands, tables, results in self._steps:
            arguments = [values[operand] for operand in operands] + [self._buffers[name] for name in tables]
            result = row(op, *arguments, **({"training": self.training} if isinstance(op, nm.BatchNorm) else {}))
            values.update(zip(results, result if isinstance(result, tuple) else (result,), strict=True))
        return {name: values[slot] for name, slot in self.output_slots}

    def export_params(self) -> Params:
        """Parameter values by name, float32 copies on the CPU."""
        return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in self.state_dict().items()}


def to_module(
    graph: Graph, params: Mapping[str, np.ndarray] | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> GraphModule:
    """Make a trainable module of an expanded graph.

    Args:
        graph: Graph without component nodes.
        params: Parameter values; drawn from `seed` where absent.
        seed: Seed of the drawn values.
        dtype: Element type of parameters, constants and tables.

    Raises:
        GraphError: A component node is left, or a parameter value is missing or has another shape.
    """
    graph = UnrollLoops()(graph)
    values: Mapping[str, Any] = initialize(graph, seed) if params is None else params
    for name, node in graph.parameters.items():
        found = np.shape(values[name]) if name in values else None
        if found != node.types[0].shape:
            message = "parameter value is missing" if found is None else "parameter value has another shape"
            raise GraphError(message, where=name, expected=str(node.types[0].shape), found=str(found))
    return GraphModule(graph, values, dtype)
