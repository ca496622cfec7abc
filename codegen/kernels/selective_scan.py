"""Fused selective scan (Mamba, S6): a diagonal recurrence whose decay depends on channel, state and step.

B batch, T steps, H heads (1 in Mamba), N states, V channels of a head. Channels lie along the lanes; a unit scans one
vector of channels over all steps with its N states in registers or the first-level cache. The exponential of every
(state, channel, step) is most of the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc
from codegen.kernels.base import Array, Isa, Kernel, Knobs, View
from codegen.kernels.emit import (
    Index,
    Vectors,
    bind,
    build_function,
    ceil_div,
    parallel_block,
    prefetch,
    scratch,
    serial,
)
from codegen.kernels.vector_math import ACTIVATION_REFERENCES, ACTIVATIONS, LOG2_E, exp, exp2_nonpositive
from ir.types import TensorType

STATES_UNROLLED: Final = 16
ROWS_AHEAD: Final = 16  # some two microseconds of steps


@dataclass(frozen=True)
class SelectiveScanKernel(Kernel):
    """`h_t = exp(dt_t A) h_{t-1} + B_t u_t`, `y_t = scale * C_t^T h_t`, then `+ D x_t` and `* activation(z_t)`.

    `u` is the operand x itself, or `dt * x` with `scaled_input`.

    Operands: C and B `[rows, H*N]`, x and dt `[rows, H*V]` (each maybe a window of a wider buffer; rows are B*T), A
    `[H, N, V]`, then D `[H*V]` if `skip`, z `[rows, H*V]` if `gate`, the initial state `[B, H, N, V]` if there is one;
    out `[rows, H*V]`, then the final state if wanted.

    Attributes:
        batch: Sequences.
        t: Steps of a sequence.
        channels: Channels of a head.
        state: States of a channel.
        heads: Heads.
        scale: Factor of the readout.
        decaying: Whether every dt A is known to be <= 0, which makes the exponential cheaper.
        scaled_input: Whether x is multiplied by dt.
        skip: Whether D x is added.
        gate: Activation of the gate z, none if there is no gate.
        initial_state: Whether the first state is an operand, zero otherwise.
        final_state: Whether the last state is an output.
        c_view: Buffer that holds C.
        b_view: Buffer that holds B.
        x_view: Buffer that holds x.
        dt_view: Buffer that holds dt.
        z_view: Buffer that holds z.
    """

    batch: int
    t: int
    channels: int
    state: int
    heads: int = 1
    scale: float = 1.0
    decaying: bool = False
    scaled_input: bool = False
    skip: bool = False
    gate: str | None = None
    initial_state: bool = False
    final_state: bool = False
    c_view: View | None = None
    b_view: View | None = None
    x_view: View | None = None
    dt_view: View | None = None
    z_view: View | None = None

    family: ClassVar[str] = "selective_scan"

    @property
    def views(self) -> tuple[View, View, View, View, View]:
        """Where C, B, x, dt and z lie, defaults filled in."""
        states, values = View(self.heads * self.state), View(self.heads * self.channels)
        given = (self.c_view, self.b_view, self.x_view, self.dt_view, self.z_view)
        defaults = (states, states, values, values, values)
        c, b, x, dt, z = (view or default for view, default in zip(given, defaults, strict=True))
        return c, b, x, dt, z

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a state."""
        return (self.batch, self.heads, self.state, self.channels)

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Operands C, B, x, dt, A, D, z, initial state."""
        rows = self.batch * self.t
        operands = [TensorType((rows, view.width)) for view in self.views[:4]]
        operands.append(TensorType((self.heads, self.state, self.channels)))
        if self.skip:
            operands.append(TensorType((self.heads * self.channels,)))
        if self.gate:
            operands.append(TensorType((rows, self.views[4].width)))
        return (*operands, *[TensorType(self.state_shape)] * self.initial_state)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The output and the final state."""
        out = TensorType((self.batch * self.t, self.heads * self.channels))
        return (out, *[TensorType(self.state_shape)] * self.final_state)

    @property
    def flops(self) -> int:
        """Decay and its exponential, update and readout of every state at every step; then the epilogue."""
        cells = self.batch * self.t * self.heads * self.channels
        return cells * (7 * self.state + 2 * self.skip + 2 * (self.gate is not None) + self.scaled_input)

    def knobs(self, isa: Isa) -> Knobs:
        """Keep all states unrolled where they are few."""
        return {"unroll": min(self.state, STATES_UNROLLED)}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Return the rule's choice, then shorter unrolled groups of states."""
        sizes = dict.fromkeys((int(self.knobs(isa)["unroll"]), 8, 4))
        return [{"unroll": size} for size in sizes if size <= self.state]

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the scan."""
        return build_function(self, isa, knobs, lambda *buffers: _SelectiveWriter(self, isa, knobs, buffers).write())

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Step through time in float64."""
        arrays = tuple(np.asarray(array, np.float64) for array in arrays)
        remaining = list(arrays[5:])
        sizes = (self.state, self.state, self.channels, self.channels)
        c_BTHN, b_BTHN, x_BTHV, dt_BTHV = (
            self._heads(array, view, size) for array, view, size in zip(arrays, self.views, sizes, strict=False)
        )
        rate_HNV = arrays[4]
        skip_HV = remaining.pop(0).reshape(self.heads, self.channels) if self.skip else 0.0
        z_BTHV = self._heads(remaining.pop(0), self.views[4], self.channels) if self.gate else None
        state_BHNV = remaining.pop(0) if self.initial_state else np.zeros(self.state_shape)
        out_BTHV = np.empty(x_BTHV.shape)
        u_BTHV = x_BTHV * dt_BTHV if self.scaled_input else x_BTHV
        for t in range(self.t):
            update = b_BTHN[:, t, :, :, None] * u_BTHV[:, t, :, None, :]
            state_BHNV = np.exp(dt_BTHV[:, t, :, None, :] * rate_HNV) * state_BHNV + update
            out_BTHV[:, t] = self.scale * np.einsum("bhn,bhnv->bhv", c_BTHN[:, t], state_BHNV)
        out_BTHV = out_BTHV + skip_HV * x_BTHV
        if z_BTHV is not None and self.gate:
            out_BTHV = out_BTHV * ACTIVATION_REFERENCES[self.gate](z_BTHV)
        return (out_BTHV.reshape(self.outputs[0].shape), state_BHNV)[: 1 + self.final_state]

    def _heads(self, array: Array, view: View, size: int) -> Array:
        columns = array[:, view.offset : view.offset + self.heads * size]
        return columns.reshape(self.batch, self.t, self.heads, size)


class _SelectiveWriter:
    """Writes one selective scan."""

    def __init__(self, kernel: SelectiveScanKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.vec, self.unroll = kernel, Vectors(isa.lanes), int(knobs["unroll"])
        self.c, self.b, self.x, self.dt, self.rate, *rest = buffers
        self.last_state = rest.pop() if kernel.final_state else None
        self.out = rest.pop()
        self.first_state = rest.pop() if kernel.initial_state else None
        self.z = rest.pop() if kernel.gate else None
        self.skip = rest.pop() if kernel.skip else None
        self.exp = exp2_nonpositive if kernel.decaying else exp

    def write(self) -> None:
        """Loop over batch, heads and vectors of channels."""
        kernel, lanes = self.kernel, self.vec.lanes
        groups = ceil_div(kernel.channels, lanes)
        with parallel_block(kernel.batch * kernel.heads * groups, flops=kernel.flops) as unit:
            self.column = bind(unit % groups * lanes)
            self.head = bind(unit // groups % kernel.heads)
            self.batch = bind(unit // (groups * kernel.heads))
            self.channel = bind(self.head * kernel.channels + self.column)  # among those of all heads
            self.live: Index | None = bind(kernel.channels - self.column) if kernel.channels % lanes else None
            self.rates: Buffer | None = None
            if kernel.t == 1:  # decoding: straight from one state operand to the other
                self._step(self.batch)
                return
            self.state, self.rates = scratch((kernel.state, lanes)), scratch((kernel.state, lanes))
            with serial(0, kernel.state) as n:
                self.vec.store(self.state, self._first(n), n, 0)
                self.vec.store(self.rates, self._rate(n), n, 0)
            with serial(0, kernel.t) as t:
                row = bind(self.batch * kernel.t + t)
                self._fetch(row + ROWS_AHEAD)
                self._step(row)
            with serial(0, kernel.state) as n:
                self._keep(n, self.vec.load(self.state, n, 0))

    def _fetch(self, row: Expr) -> None:
        """Fetch the unit's channels of a later row: rows lie pages apart, so the processor does not see them coming."""
        _, _, x_view, dt_view, z_view = self.kernel.views
        prefetch(self.x, row, x_view.offset + self.channel)
        prefetch(self.dt, row, dt_view.offset + self.channel)
        if self.z is not None:
            prefetch(self.z, row, z_view.offset + self.channel)
        prefetch(self.out, row, self.channel)

    def _first(self, n: Index) -> Expr:
        """Return the initial state."""
        if self.first_state is None:
            return self.vec.splat(0.0)
        return self.vec.load(self.first_state, self.batch, self.head, n, self.column, live=self.live)

    def _keep(self, n: Index, value: Expr) -> None:
        """Store the final state, if wanted."""
        if self.last_state is not None:
            self.vec.store(self.last_state, value, self.batch, self.head, n, self.column, live=self.live)

    def _rate(self, n: Index) -> Expr:
        """Return the rates of one state, in the unit that the exponential takes."""
        rate = self.vec.load(self.rate, self.head, n, self.column, live=self.live)
        return rate * self.vec.splat(LOG2_E) if self.kernel.decaying else rate

    def _channels(self, buffer: Buffer, row: Expr, view: View) -> Expr:
        """Load the unit's channels of one row."""
        return bind(self.vec.load(buffer, row, view.offset + self.channel, live=self.live))

    def _step(self, row: Expr) -> None:
        """Advance the unit's channels by one step."""
        kernel, vec = self.kernel, self.vec
        c_view, b_view, x_view, dt_view, z_view = kernel.views
        step = self._channels(self.dt, row, dt_view)
        x = self._channels(self.x, row, x_view)
        u = bind(step * x) if kernel.scaled_input else x
        c_column, b_column = c_view.offset + self.head * kernel.state, b_view.offset + self.head * kernel.state
        total = vec.register(0.0)

        def advance(n: Index) -> None:
            rate = self._rate(n) if self.rates is None else vec.load(self.rates, n, 0)
            before = self._first(n) if self.rates is None else vec.load(self.state, n, 0)
            state = bind(self.exp(step * rate) * before + vec.splat(self.b[row, b_column + n]) * u)
            if self.rates is None:
                self._keep(n, state)
            else:
                vec.store(self.state, state, n, 0)
            total.set(total.get() + vec.splat(self.c[row, c_column + n]) * state)

        groups, rest = divmod(kernel.state, self.unroll)
        if groups == 1:
            for n in range(self.unroll):
                advance(n)
        else:
            with serial(0, groups) as group:
                for n in range(self.unroll):
                    advance(group * self.unroll + n)
        for n in range(kernel.state - rest, kernel.state):
            advance(n)
        result = total.get() if kernel.scale == 1.0 else total.get() * vec.splat(kernel.scale)
        if self.skip is not None:
            result = result + vec.load(self.skip, self.channel, live=self.live) * x
        if self.z is not None and kernel.gate:
            result = result * ACTIVATIONS[kernel.gate](self._channels(self.z, row, z_view))
        vec.store(self.out, result, row, self.channel, live=self.live)
