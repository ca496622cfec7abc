"""Rows of reductions, shapes, order, and reading and writing at positions that are data."""

from __future__ import annotations

import math

import numpy as np

from codegen.onnx_export.emitter import Emitter, Row, Site, Table
from ir.ops import indexing as ix
from ir.ops import reduction as rd
from ir.ops import shape as sh
from ir.ops import sorting as so


def _reduce(kind: str) -> Row:
    return lambda e, site, x: e(kind, x, e.ints(*site.op.axes), keepdims=int(site.op.keepdims))


def _cumsum(e: Emitter, site: Site, x: str) -> str:
    return e("CumSum", x, e.constant(np.asarray(site.op.axis, np.int64)))


def _slice(e: Emitter, site: Site, x: str) -> str:
    op: sh.Slice = site.op
    return e("Slice", x, e.ints(op.start), e.ints(op.stop), e.ints(op.axis), e.ints(op.stride))


def _pad(e: Emitter, site: Site, x: str) -> str:
    op: sh.Pad = site.op
    fill = np.asarray(op.value, {"int32": np.int32, "bool": np.bool_}.get(site.dtype, np.float32))
    value = e.constant(fill) if fill.dtype != np.float32 else e.floats(fill, site.dtype)
    return e("Pad", x, e.ints(*op.low, *op.high), value)


def _gather(e: Emitter, site: Site, x: str, indices: str) -> str:
    kind, axis = site.types[1], site.op.axis % site.types[0].rank
    if math.prod(kind.shape) == kind.shape[axis]:  # one index serves every position beside the axis
        return e("Gather", x, e.reshape(indices, (kind.shape[axis],)), axis=axis)
    return e("GatherElements", x, e.expand(indices, site.results[0].shape), axis=axis)


def _scatter_add(e: Emitter, site: Site, base: str, indices: str, updates: str) -> str:
    whole = e.expand(indices, site.types[2].shape)
    return e("ScatterElements", base, whole, updates, axis=site.op.axis, reduction="add")


def _dynamic_update(e: Emitter, site: Site, base: str, update: str, position: str) -> str:
    kind, axis = site.types[1], site.op.axis % site.types[1].rank
    places = e("Add", position, e.constant(np.arange(kind.shape[axis], dtype=np.int32)))
    beside = [kind.shape[axis] if index == axis else 1 for index in range(kind.rank)]
    return e("ScatterElements", base, e.expand(e.reshape(places, beside), kind.shape), update, axis=axis)


def _top_k(e: Emitter, site: Site, x: str) -> tuple[str, str]:
    values, places = e.many(2, "TopK", x, e.ints(site.op.k), axis=-1, largest=int(site.op.largest), sorted=1)
    return values, e.cast(places, "int32")


ROWS: Table = {
    rd.Sum: _reduce("ReduceSum"),
    rd.Mean: _reduce("ReduceMean"),
    rd.Max: _reduce("ReduceMax"),
    rd.Cumsum: _cumsum,
    sh.Reshape: lambda e, site, x: e.reshape(x, site.results[0].shape),
    sh.Transpose: lambda e, site, x: e.transpose(x, *site.op.permutation),
    sh.Slice: _slice,
    sh.Concat: lambda e, site, *parts: e("Concat", *parts, axis=site.op.axis),
    sh.Pad: _pad,
    sh.Broadcast: lambda e, site, x: e.expand(x, site.op.shape),
    ix.Take: lambda e, site, table, indices: e("Gather", table, indices, axis=0),
    ix.Gather: _gather,
    ix.ScatterAdd: _scatter_add,
    ix.DynamicUpdate: _dynamic_update,
    so.TopK: _top_k,
}
