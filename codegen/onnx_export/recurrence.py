"""Rows of the recurrences: a `Scan` over time whose body is one step; a single step stands without it.

Shape letters: B batch, T time, H heads, K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from codegen.onnx_export.emitter import Emitter, Site, Table, Typed, value_info
from ir.ops import recurrence as rc
from ir.types import TensorType

Step = Callable[[Emitter, str, Sequence[str]], tuple[str, str]]
"""`step(emitter, state, elements at t and what stays)` gives the state after t and the output at t."""


def _over_time(
    e: Emitter, step: Step, state: Typed, series: Sequence[Typed], output: TensorType, fixed: Sequence[Typed] = ()
) -> tuple[str, str]:
    """Run a step over axis 1 of several series.

    Args:
        e: Where to write.
        step: Writes one step.
        state: The state before the first step, and its type.
        series: Each with its type `[B, T, ...]`.
        output: Type of the output of one step.
        fixed: What every step reads as it is; it is carried along, because OpenVINO reads nothing from outside a body.

    Returns:
        The last state, and the outputs `[B, T, ...]`.
    """
    first, kind = state
    steps = series[0][1].shape[1]
    if steps == 1:
        now = [e("Squeeze", name, e.ints(1)) for name, _ in series]
        last, out = step(e, first, [*now, *(name for name, _ in fixed)])
        return last, e("Unsqueeze", out, e.ints(1))
    inner = Emitter(shared=e)
    before = [(inner.fresh("state"), kind), *((inner.fresh("fixed"), each) for _, each in fixed)]
    elements = [(inner.fresh("element"), _without_time(each)) for _, each in series]
    given = [name for name, _ in (*elements, *before[1:])]
    after, out = step(inner, before[0][0], given)
    kept = [(inner("Identity", name), each) for name, each in before[1:]]
    body = inner.body(
        [value_info(name, each) for name, each in (*before, *elements)],
        [value_info(name, each) for name, each in ((after, kind), *kept, (out, output))],
    )
    results = e.many(
        len(before) + 1,
        "Scan",
        first,
        *(name for name, _ in (*fixed, *series)),
        body=body,
        num_scan_inputs=len(series),
        scan_input_axes=[1] * len(series),
        scan_output_axes=[1],
    )
    return results[0], results[-1]


def _without_time(kind: TensorType) -> TensorType:
    return kind.with_shape((kind.shape[0], *kind.shape[2:]))


def _linear_scan(e: Emitter, site: Site, a: str, b: str) -> str:
    kind = _without_time(site.types[0])

    def step(e: Emitter, state: str, now: Sequence[str]) -> tuple[str, str]:
        after = e("Add", now[1], e("Mul", state, now[0]))  # OpenVINO 2026.4 loses the state in the other order
        return after, e("Identity", after)

    zeros = e.floats(np.zeros(kind.shape), kind.dtype)
    _, states = _over_time(e, step, (zeros, kind), [(a, site.types[0]), (b, site.types[0])], kind)
    return states


def _outer_scan(e: Emitter, site: Site, q: str, k: str, v: str, *rest: str) -> tuple[str, str]:
    op: rc.OuterScan = site.op
    (batch, steps, heads, keys), values = site.types[0].shape, site.types[2].shape[3]
    shape = site.results[1]

    def series(name: str, *sizes: int) -> Typed:
        whole = (batch, steps, heads, *sizes)
        return e.reshape(name, whole), TensorType(whole, shape.dtype)

    if op.scale != 1.0:
        q = e("Mul", q, e.floats(op.scale, shape.dtype))
    given = [series(q, 1, keys), series(k, keys, 1), series(v, 1, values)]
    fixed = [(rest[1], site.types[4])] if op.decay == "state" else []
    match op.decay:
        case "head":
            given.append(series(e("Exp", rest[0]), 1, 1))
        case "key":
            given.append(series(e("Exp", rest[0]), keys, 1))
        case "state":
            given.append(series(rest[0], 1, values))
    if op.delta:
        given.append(series(rest[-2 if op.has_state else -1], 1, 1))

    def step(e: Emitter, state: str, now: Sequence[str]) -> tuple[str, str]:
        return _outer_step(e, op, state, now)

    initial = rest[-1] if op.has_state else e.floats(np.zeros(shape.shape), shape.dtype)
    read = TensorType((batch, heads, 1, values), shape.dtype)
    last, outputs = _over_time(e, step, (initial, shape), given, read, fixed)
    return e.reshape(outputs, site.results[0].shape), last


def _outer_step(e: Emitter, op: rc.OuterScan, state: str, now: Sequence[str]) -> tuple[str, str]:
    """One step of `OuterScan`; q `[B, H, 1, K]`, k `[B, H, K, 1]`, v `[B, H, 1, V]`, then decay, beta or rate."""
    q, k, v = now[:3]
    if op.decay == "state":
        state = e("Mul", e("Exp", e("Mul", now[3], now[4])), state)
    elif op.decay != "none":
        state = e("Mul", now[3], state)
    written = v
    if op.delta:
        known = e("MatMul", e.transpose(k, 0, 1, 3, 2), state)
        written = e("Mul", now[-1], e("Sub", v, known))
    after = e("Add", state, e("Mul", k, written))
    return after, e("MatMul", q, after)


ROWS: Table = {rc.LinearScan: _linear_scan, rc.OuterScan: _outer_scan}
