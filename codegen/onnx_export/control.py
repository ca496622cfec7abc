"""The row of the loop: a `Loop` whose body is the loop's own."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from codegen.onnx_export.emitter import Emitter, Site, Table, value_info
from codegen.onnx_export.nodes import write_nodes
from ir.ops.control import Loop


def _loop(e: Emitter, site: Site, *operands: str) -> tuple[str, ...]:
    """What is carried goes from turn to turn; what is given is read from outside the body."""
    op: Loop = site.op
    graph, count = op.body.graph, len(site.results)
    inner = Emitter(shared=e)
    carried = [inner.fresh("carried") for _ in site.results]
    inputs = [node.results[0] for node in graph.inputs.values()]
    values = dict(zip(inputs, [*carried, *operands[count:]], strict=True))
    write_nodes(inner, graph, values)
    turn, going = inner.fresh("turn"), inner.fresh("going")
    flags = [helper.make_tensor_value_info(turn, TensorProto.INT64, ()), _flag(going)]
    after = [inner("Identity", values[value]) for _, value in graph.outputs]
    body = inner.body(
        [*flags, *(value_info(name, kind) for name, kind in zip(carried, site.results, strict=True))],
        [_flag(inner("Identity", going)), *(value_info(n, kind) for n, kind in zip(after, site.results, strict=True))],
    )
    times, goes_on = e.constant(np.asarray(op.times, np.int64)), e.constant(np.asarray(True))
    return e.many(count, "Loop", times, goes_on, *operands[:count], body=body)


def _flag(name: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.BOOL, ())


ROWS: Table = {Loop: _loop}
