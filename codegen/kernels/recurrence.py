"""Fused recurrent scan with a matrix state that never leaves the first-level cache.

B batch, T steps, H heads, K key size, V value size. On a CPU the recurrent form wins over the chunkwise one, because
the state (16 KB at K = V = 64) lives in the cache: each step reads and writes it once, and two steps share one pass
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc
from codegen.kernels.base import Array, Isa, Kernel, Knobs, View
from codegen.kernels.emit import (
    Index,
    Register,
    Split,
    Vectors,
    bind,
    build_function,
    ceil_div,
    column_vectors,
    parallel_block,
    scratch,
    select_constant,
    serial,
)
from codegen.kernels.vector_math import exp
from ir.types import TensorType

KEYS_UNROLLED: Final = 4
WIDEST: Final = 4  # value vectors of a unit: enough work for each broadcast key and query


@dataclass(frozen=True)
class OuterScanKernel(Kernel):
    """`S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T`, `o_t = scale * q_t^T S_t`.

    Operands: q and k `[B*T, H*K]`, v `[B*T, H*V]` (each maybe a window of a wider buffer), g if the decay is an
    operand (`[B*T, H]` for `head`, `[B*T, H*K]` for `key`), the initial state `[B, H, K, V]` if there is one; out
    `[B*T, H*V]`, then the final state `[B, H, K, V]` if wanted.

    Attributes:
        batch: Sequences.
        t: Steps of a sequence.
        heads: Heads.
        dk: Key size.
        dv: Value size.
        decay: `none`, `head` (one a head and step) or `key` (one a key element and step).
        scale: Factor of the output.
        constant_log_decay: One log decay a head, for all steps; then `decay` is `head` and g is no operand.
        initial_state: Whether the first state is an operand, zero otherwise.
        final_state: Whether the last state is an output.
        q_view: Buffer that holds q.
        k_view: Buffer that holds k.
        v_view: Buffer that holds v.
        g_view: Buffer that holds g.
    """

    batch: int
    t: int
    heads: int
    dk: int
    dv: int
    decay: str = "none"
    scale: float = 1.0
    constant_log_decay: tuple[float, ...] | None = None
    initial_state: bool = False
    final_state: bool = False
    q_view: View | None = None
    k_view: View | None = None
    v_view: View | None = None
    g_view: View | None = None

    family: ClassVar[str] = "outer_scan"

    def __post_init__(self) -> None:
        if self.constant_log_decay is not None and self.decay != "head":
            raise ValueError("a constant decay is one number a head: decay must be 'head'")

    @property
    def has_gate(self) -> bool:
        """Whether the decay is an operand."""
        return self.decay != "none" and self.constant_log_decay is None

    @property
    def views(self) -> tuple[View, View, View, View]:
        """Where q, k, v and g lie, defaults filled in."""
        keys, values = View(self.heads * self.dk), View(self.heads * self.dv)
        gates = keys if self.decay == "key" else View(self.heads)
        return self.q_view or keys, self.k_view or keys, self.v_view or values, self.g_view or gates

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of a state."""
        return (self.batch, self.heads, self.dk, self.dv)

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Operands q, k, v, g, initial state."""
        views = self.views[: 4 if self.has_gate else 3]
        operands = [TensorType((self.batch * self.t, view.width)) for view in views]
        return (*operands, *[TensorType(self.state_shape)] * self.initial_state)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The output and the final state."""
        out = TensorType((self.batch * self.t, self.heads * self.dv))
        return (out, *[TensorType(self.state_shape)] * self.final_state)

    @property
    def flops(self) -> int:
        """Decay, update and readout of every state element at every step."""
        return self.batch * self.t * self.heads * self.dk * self.dv * (4 + (self.decay != "none"))

    def knobs(self, isa: Isa) -> Knobs:
        """Give each unit up to four value vectors and two steps at once, and each thread equal units."""
        vectors = ceil_div(self.dv, isa.lanes)
        parts = ceil_div(vectors, WIDEST)
        units = self.batch * self.heads
        while parts < vectors and units * parts < 4 * isa.threads and units * parts % isa.threads:
            parts += 1
        return {"vectors": ceil_div(vectors, parts), "steps": min(2, self.t)}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Return the rule's choice, then other widths and numbers of steps in one pass over the state."""
        space = [self.knobs(isa)]
        for steps in (1, 2, 4):
            for vectors in range(1, min(8, ceil_div(self.dv, isa.lanes)) + 1):
                candidate = {"vectors": vectors, "steps": min(steps, self.t)}
                if candidate not in space:
                    space.append(candidate)
        return space

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the scan."""
        return build_function(self, isa, knobs, lambda *buffers: _ScanWriter(self, isa, knobs, buffers).write())

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Step through time in float64."""
        arrays = tuple(np.asarray(array, np.float64) for array in arrays)
        sizes = (self.dk, self.dk, self.dv, self.dk if self.decay == "key" else 1)
        operands = [
            array[:, view.offset : view.offset + self.heads * size].reshape(self.batch, self.t, self.heads, size)
            for array, view, size in zip(arrays[: 3 + self.has_gate], self.views, sizes, strict=False)
        ]
        q_BTHK, k_BTHK, v_BTHV = operands[:3]
        g_BTHK = operands[3] if self.has_gate else np.zeros((self.batch, self.t, self.heads, 1))
        if self.constant_log_decay:
            g_BTHK = g_BTHK + np.array(self.constant_log_decay)[:, None]
        state_BHKV = arrays[-1] if self.initial_state else np.zeros(self.state_shape)
        out_BTHV = np.empty(v_BTHV.shape)
        for t in range(self.t):
            update = k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None, :]
            state_BHKV = np.exp(g_BTHK[:, t])[..., None] * state_BHKV + update
            out_BTHV[:, t] = self.scale * np.einsum("bhk,bhkv->bhv", q_BTHK[:, t], state_BHKV)
        return (out_BTHV.reshape(self.outputs[0].shape), state_BHKV)[: 1 + self.final_state]


class _ScanWriter:
    """Writes one scan; holds what every part of the loop nest needs."""

    def __init__(self, kernel: OuterScanKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.vec = kernel, Vectors(isa.lanes)
        self.q, self.k, self.v, *rest = buffers
        self.last_state = rest.pop() if kernel.final_state else None
        self.out = rest.pop()
        self.first_state = rest.pop() if kernel.initial_state else None
        self.g = rest.pop() if kernel.has_gate else None
        self.steps = int(knobs["steps"])
        self.parts = Split(ceil_div(kernel.dv, isa.lanes), int(knobs["vectors"]))
        self.state: Buffer | None = None

    def write(self) -> None:
        """Loop over batch, heads and parts of the values."""
        kernel = self.kernel
        with parallel_block(kernel.batch * kernel.heads * self.parts.count, flops=kernel.flops) as unit:
            part = unit % self.parts.count
            self.head = bind(unit // self.parts.count % kernel.heads)
            self.batch = bind(unit // (self.parts.count * kernel.heads))
            self.q_column, self.k_column, self.v_column, _ = (
                bind(view.offset + self.head * size)
                for view, size in zip(kernel.views, (kernel.dk, kernel.dk, kernel.dv, 0), strict=True)
            )
            g_size = kernel.dk if kernel.decay == "key" else 1
            self.g_column = bind(kernel.views[3].offset + self.head * g_size)
            self.parts.for_each(part, self._part)

    def _part(self, first_vector: Index, vectors: int) -> None:
        """Scan some vectors of the values over all steps."""
        kernel, lanes = self.kernel, self.vec.lanes
        self.vectors = vectors
        self.column = bind(first_vector * lanes) if isinstance(first_vector, Expr) else first_vector * lanes
        if kernel.constant_log_decay:
            factor = self.vec.splat(select_constant(self.head, kernel.constant_log_decay))
            self.constant = bind(exp(factor))
        if kernel.t == 1:  # decoding: straight from one state operand to the other
            self._steps(0, 1)
            return
        self.state = scratch((kernel.dk, vectors * lanes))
        with serial(0, kernel.dk) as i:
            for v in range(vectors):
                self.vec.store(self.state, self._initial(i, v), i, v * lanes)
        full, rest = divmod(kernel.t, self.steps)
        with serial(0, full) as block:
            self._steps(bind(block * self.steps), self.steps)
        if rest:
            self._steps(full * self.steps, rest)
        if self.last_state is not None:
            with serial(0, kernel.dk) as i:
                for v in range(vectors):
                    self._keep(self.vec.load(self.state, i, v * lanes), i, v)

    def _live(self, v: int) -> Index | None:
        """Return the lanes of a value vector that exist; only the very last vector may be short."""
        if not self.kernel.dv % self.vec.lanes or v < self.vectors - 1:
            return None
        return self.kernel.dv - (self.column + v * self.vec.lanes)

    def _initial(self, i: Index, v: int) -> Expr:
        if self.first_state is None:
            return self.vec.splat(0.0)
        column = self.column + v * self.vec.lanes
        return self.vec.load(self.first_state, self.batch, self.head, i, column, live=self._live(v))

    def _keep(self, value: Expr, i: Index, v: int) -> None:
        if self.last_state is not None:
            column = self.column + v * self.vec.lanes
            self.vec.store(self.last_state, value, self.batch, self.head, i, column, live=self._live(v))

    def _steps(self, first: Index, steps: int) -> None:
        """Advance some steps in one pass over the state."""
        kernel, vec = self.kernel, self.vec
        self.rows = [bind(self.batch * kernel.t + (first + s)) for s in range(steps)]
        self.decays = [self._decay(row) for row in self.rows]
        values = [
            [
                bind(vec.load(self.v, row, self.v_column + self.column + v * vec.lanes, live=self._live(v)))
                for v in range(self.vectors)
            ]
            for row in self.rows
        ]
        sums = [[vec.register(0.0) for _ in range(self.vectors)] for _ in range(steps)]
        unrolled, rest = divmod(kernel.dk, KEYS_UNROLLED)
        if unrolled:
            with serial(0, unrolled) as group:
                for i in range(KEYS_UNROLLED):
                    self._key(group * KEYS_UNROLLED + i, values, sums)
        for i in range(kernel.dk - rest, kernel.dk):
            self._key(i, values, sums)
        for row, line in zip(self.rows, sums, strict=True):
            for v, register in enumerate(line):
                column = self.head * kernel.dv + self.column + v * vec.lanes
                vec.store(self.out, register.get() * vec.splat(kernel.scale), row, column, live=self._live(v))

    def _decay(self, row: Expr) -> Buffer | Expr | None:
        """Return the decay of one step: a vector for a head, a scratch buffer over the keys, or None."""
        kernel, vec = self.kernel, self.vec
        if kernel.decay == "none":
            return None
        if self.g is None:
            return self.constant
        if kernel.decay == "head":
            return bind(exp(vec.splat(self.g[row, self.g_column])))
        factors = scratch((ceil_div(kernel.dk, vec.lanes) * vec.lanes,))
        for c, live in enumerate(column_vectors(kernel.dk, vec.lanes)):
            gate = vec.load(self.g, row, self.g_column + c * vec.lanes, live=live)
            vec.store(factors, exp(gate), c * vec.lanes)
        return factors

    def _key(self, i: Index, values: list[list[Expr]], sums: list[list[Register]]) -> None:
        """Advance one row of the state and add its share of the outputs."""
        vec = self.vec
        states = [
            self._initial(i, v) if self.state is None else vec.load(self.state, i, v * vec.lanes)
            for v in range(self.vectors)
        ]
        for row, decay, line, outs in zip(self.rows, self.decays, values, sums, strict=True):
            key = bind(vec.splat(self.k[row, self.k_column + i]))
            query = bind(vec.splat(self.q[row, self.q_column + i]))
            if decay is not None:
                factor = bind(vec.splat(decay[i])) if self.kernel.decay == "key" else decay
                states = [state * factor for state in states]
            states = [bind(state + key * value) for state, value in zip(states, line, strict=True)]
            for state, out in zip(states, outs, strict=True):
                out.set(out.get() + query * state)
        for v, state in enumerate(states):
            if self.state is None:
                self._keep(state, i, v)
            else:
                vec.store(self.state, state, i, v * vec.lanes)
