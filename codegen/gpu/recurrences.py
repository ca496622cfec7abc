"""Recurrences: a work-group for each head of a sequence, a thread for each element of the value, time inside.

B batch, T steps, H heads, K key size, V value size. A thread keeps its column of the state, which no other thread
needs: neither the update nor the delta rule mixes columns. Keys, queries and decays of some steps come to shared memory
together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from codegen._tvm import Buffer, Expr, PrimFunc, tirx
from codegen.gpu.emit import (
    Index,
    Operand,
    add_to,
    barrier,
    bind,
    branch,
    build_function,
    each,
    guarded,
    launch,
    number,
    private,
    put,
    serial,
    shared,
    strided,
    unrolled,
)
from codegen.kernels.base import Knobs, View
from codegen.kernels.delta_scan import DeltaScanKernel
from codegen.kernels.emit import select_constant
from codegen.kernels.recurrence import OuterScanKernel
from codegen.kernels.scan import ScanKernel
from codegen.kernels.selective_scan import SelectiveScanKernel
from codegen.kernels.vector_math import ACTIVATIONS
from codegen.targets.base import Gpu

STEPS: Final = 16
"""Steps whose keys come to shared memory together."""


def outer_scan_knobs(kernel: OuterScanKernel | DeltaScanKernel, gpu: Gpu) -> Knobs:
    """Take a thread for each value element, and as many steps at once as half of the shared memory holds."""
    threads = 32
    while threads < min(kernel.dv, 64, gpu.max_threads):
        threads *= 2
    steps = STEPS
    while steps > 1 and 4 * steps * 3 * kernel.dk > gpu.shared_bytes // 2:
        steps //= 2
    return {"threads": threads, "steps": min(steps, kernel.t)}


@dataclass(frozen=True)
class _Scan:
    """What the two forms of a matrix-state scan have in common.

    Attributes:
        kernel: The workload.
        views: Where q, k, v and g lie.
        q, k, v, g, beta: Operands; g and beta maybe None.
        first: The initial state, maybe None.
        out: The output.
        last: The final state, maybe None.
    """

    kernel: OuterScanKernel | DeltaScanKernel
    views: tuple[View, View, View, View]
    q: Operand
    k: Operand
    v: Operand
    g: Operand | None
    beta: Operand | None
    first: Operand | None
    out: Operand
    last: Operand | None
    constant: tuple[float, ...] | None

    def write(self, threads: int, steps: int) -> None:
        """Loop over time inside, some steps at once."""
        kernel = self.kernel
        parts = -(-kernel.dv // threads)
        gates = self.g is not None and kernel.decay == "key"
        with launch(kernel.batch * kernel.heads * parts, threads) as (group, thread):
            head, batch = bind(group // parts % kernel.heads), bind(group // (parts * kernel.heads))
            column = bind(group % parts * threads + thread) if parts > 1 else thread
            site = _Site(self, batch, head, bind(tirx.min(column, kernel.dv - 1)), thread, threads)
            exists = None if kernel.dv % threads == 0 else column < kernel.dv
            state = private(kernel.dk, 0.0)
            if self.first is not None:
                with unrolled(kernel.dk) as i:
                    put(state, self.first[site.state_place(i)], i)
            areas = [shared(steps * kernel.dk) for _ in range(2 + gates)]
            with serial(0, -(-kernel.t // steps)) as block:
                start = bind(block * steps)
                site.bring(areas, start, steps)
                barrier()
                with serial(0, steps if kernel.t % steps == 0 else tirx.min(kernel.t - start, steps)) as step:
                    site.advance(state, areas, bind(start + step), step, exists)
                barrier()
            if self.last is not None:
                _where(exists, lambda: site.keep(state))


def _where(exists: Expr | None, body: object) -> None:
    assert callable(body)
    if exists is None:
        body()
    else:
        with branch(exists):
            body()


@dataclass(frozen=True)
class _Site:
    """One thread of a scan: its sequence, head and column."""

    scan: _Scan
    batch: Expr
    head: Expr
    column: Expr
    thread: Expr
    threads: int

    def state_place(self, i: Index) -> Expr:
        """Return where an element of the thread's column lies in a state `[B, H, K, V]`."""
        kernel = self.scan.kernel
        return ((self.batch * kernel.heads + self.head) * kernel.dk + i) * kernel.dv + self.column

    def keep(self, state: Buffer) -> None:
        """Store the final state."""
        assert self.scan.last is not None
        with unrolled(self.scan.kernel.dk) as i:
            self.scan.last.put(state[i], self.state_place(i))

    def _row(self, step: Expr, view: View, size: int) -> Expr:
        row = self.batch * self.scan.kernel.t + step
        return row * view.width + view.offset + self.head * size

    def bring(self, areas: list[Buffer], start: Expr, steps: int) -> None:
        """Bring queries, keys and decays of some steps to shared memory; those past the end count as zero."""
        scan, dk = self.scan, self.scan.kernel.dk
        sources = [(scan.q, scan.views[0]), (scan.k, scan.views[1])]
        if len(areas) > 2 and scan.g is not None:
            sources.append((scan.g, scan.views[3]))
        with strided(self.thread, self.threads, steps * dk) as place:
            step, element = bind(start + place // dk), bind(place % dk)
            inside = step < scan.kernel.t if scan.kernel.t % steps else True
            for number_, (area, (source, view)) in enumerate(zip(areas, sources, strict=True)):
                value = guarded(inside, lambda s=source, w=view: s[self._row(step, w, dk) + element])
                put(area, tirx.exp(value) if number_ == 2 else value, place)

    def advance(self, state: Buffer, areas: list[Buffer], step: Expr, local: Expr, exists: Expr | None) -> None:
        """Advance the thread's column by one step."""
        scan, kernel, dk = self.scan, self.scan.kernel, self.scan.kernel.dk
        base = bind(local * dk)
        decay = self._head_decay(step)
        value = private(1)
        put(value, scan.v[self._row(step, scan.views[2], kernel.dv) + self.column], 0)
        if decay is not None or len(areas) > 2:
            with unrolled(dk) as i:
                put(state, state[i] * (decay if decay is not None else areas[2][base + i]), i)
        if scan.beta is not None:
            found = private(1, 0.0)
            with unrolled(dk) as i:
                add_to(found, state[i] * areas[1][base + i], 0)
            beta = scan.beta[(self.batch * kernel.t + step) * kernel.heads + self.head]
            put(value, beta * (value[0] - found[0]), 0)
        total = private(1, 0.0)
        with unrolled(dk) as i:
            put(state, state[i] + areas[1][base + i] * value[0], i)
            add_to(total, areas[0][base + i] * state[i], 0)
        place = (self.batch * kernel.t + step) * (kernel.heads * kernel.dv) + self.head * kernel.dv + self.column
        result = total[0] if kernel.scale == 1.0 else total[0] * number(kernel.scale)
        _where(exists, lambda: scan.out.put(result, place))

    def _head_decay(self, step: Expr) -> Expr | None:
        scan = self.scan
        if scan.kernel.decay != "head":
            return None
        decay = private(1)
        if scan.constant is not None:
            put(decay, tirx.exp(select_constant(self.head, scan.constant)), 0)
        else:
            assert scan.g is not None
            put(decay, tirx.exp(scan.g[self._row(step, scan.views[3], 1)]), 0)
        return decay[0]


def write_outer_scan(kernel: OuterScanKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write a scan with a matrix state."""
    del gpu

    def write(q: Operand, k: Operand, v: Operand, *rest: Operand) -> None:
        pending = list(rest)
        g = pending.pop(0) if kernel.has_gate else None
        first = pending.pop(0) if kernel.initial_state else None
        out = pending.pop(0)
        last = pending.pop(0) if kernel.final_state else None
        scan = _Scan(kernel, kernel.views, q, k, v, g, None, first, out, last, kernel.constant_log_decay)
        scan.write(int(knobs["threads"]), int(knobs["steps"]))

    return build_function(kernel, write)


def write_delta_scan(kernel: DeltaScanKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write a scan by the delta rule."""
    del gpu
    keys, values = View(kernel.heads * kernel.dk), View(kernel.heads * kernel.dv)
    views = (keys, keys, values, keys if kernel.decay == "key" else View(kernel.heads))

    def write(q: Operand, k: Operand, v: Operand, *rest: Operand) -> None:
        pending = list(rest)
        g = pending.pop(0) if kernel.decay != "none" else None
        beta = pending.pop(0)
        first = pending.pop(0) if kernel.initial_state else None
        out = pending.pop(0)
        last = pending.pop(0) if kernel.final_state else None
        scan = _Scan(kernel, views, q, k, v, g, beta, first, out, last, None)
        scan.write(int(knobs["threads"]), int(knobs["steps"]))

    return build_function(kernel, write)


def selective_knobs(kernel: SelectiveScanKernel, gpu: Gpu) -> Knobs:
    """Keep work-groups small: there are as many threads as channels only."""
    return {"threads": min(64, gpu.max_threads, kernel.batch * kernel.heads * kernel.channels)}


def write_selective_scan(kernel: SelectiveScanKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write a thread for each channel, with its states private."""
    del gpu

    def write(*operands: Operand) -> None:
        with each(kernel.batch * kernel.heads * kernel.channels, int(knobs["threads"])) as unit:
            _SelectiveWriter(kernel, operands, unit).write()

    return build_function(kernel, write)


class _SelectiveWriter:
    """Writes the scan of one channel."""

    def __init__(self, kernel: SelectiveScanKernel, operands: tuple[Operand, ...], unit: Expr) -> None:
        self.kernel = kernel
        self.c, self.b, self.x, self.dt, self.rate, *rest = operands
        self.last = rest.pop() if kernel.final_state else None
        self.out = rest.pop()
        self.first = rest.pop() if kernel.initial_state else None
        self.z = rest.pop() if kernel.gate else None
        self.skip = rest.pop() if kernel.skip else None
        self.channel = bind(unit % kernel.channels)
        self.head = bind(unit // kernel.channels % kernel.heads)
        self.batch = bind(unit // (kernel.channels * kernel.heads))

    def write(self) -> None:
        """Loop over time."""
        kernel = self.kernel
        state = private(kernel.state, 0.0)
        if self.first is not None:
            with unrolled(kernel.state) as n:
                put(state, self.first[self._state_place(n)], n)
        with serial(0, kernel.t) as step:
            self._advance(state, bind(self.batch * kernel.t + step))
        if self.last is not None:
            with unrolled(kernel.state) as n:
                self.last.put(state[n], self._state_place(n))

    def _state_place(self, n: Index) -> Expr:
        kernel = self.kernel
        return ((self.batch * kernel.heads + self.head) * kernel.state + n) * kernel.channels + self.channel

    def _of_channel(self, operand: Operand, row: Expr, view: View) -> Expr:
        value = private(1)
        column = view.offset + self.head * self.kernel.channels + self.channel
        put(value, operand[row * view.width + column], 0)
        return value[0]

    def _advance(self, state: Buffer, row: Expr) -> None:
        kernel = self.kernel
        c_view, b_view, x_view, dt_view, z_view = kernel.views
        step, x = self._of_channel(self.dt, row, dt_view), self._of_channel(self.x, row, x_view)
        u, total = private(1), private(1, 0.0)
        put(u, step * x if kernel.scaled_input else x, 0)
        c_base = bind(row * c_view.width + c_view.offset + self.head * kernel.state)
        b_base = bind(row * b_view.width + b_view.offset + self.head * kernel.state)
        with unrolled(kernel.state) as n:
            rate = self.rate[(self.head * kernel.state + n) * kernel.channels + self.channel]
            put(state, tirx.exp(step * rate) * state[n] + self.b[b_base + n] * u[0], n)
            add_to(total, self.c[c_base + n] * state[n], 0)
        result = total[0] if kernel.scale == 1.0 else total[0] * number(kernel.scale)
        column = self.head * kernel.channels + self.channel
        if self.skip is not None:
            result = result + self.skip[column] * x
        if self.z is not None and kernel.gate:
            result = result * ACTIVATIONS[kernel.gate](self._of_channel(self.z, row, z_view))
        self.out.put(result, row * (kernel.heads * kernel.channels) + column)


def write_scan(kernel: ScanKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write a thread for each position beside the axis."""
    del gpu, knobs

    def write(*operands: Operand) -> None:
        *inputs, out = operands
        with each(kernel.outer * kernel.inner, 64) as unit:
            base = bind(unit // kernel.inner * (kernel.steps * kernel.inner) + unit % kernel.inner)
            state = private(1, 0.0)
            with serial(0, kernel.steps) as step:
                place = base + step * kernel.inner
                kept = inputs[0][place] * state[0] if kernel.decay else state[0]
                put(state, kept + inputs[-1][place], 0)
                out.put(state[0], place)

    return build_function(kernel, write)
