"""Fused recurrent delta rule with a matrix state that never leaves the first-level cache.

B batch, T steps, H heads, K key size, V value size. What a step writes depends on what it reads, so a step alone takes
two passes over the state. Here one pass both writes what a block of steps found and reads for the next block: within a
block the steps act on each other through products of their keys, of which there are few.

For the steps j of a block that starts from the state S, a_j being their decays and D_j = a_1 ... a_j:

    p_j = S^T (D_j k_j)                      one pass over S
    u_j = beta_j (v_j - p_j - sum_{s<j} (k_j . a_{s+1} ... a_j k_s) u_s)
    o_j = S^T (D_j q_j) + sum_{s<=j} (q_j . a_{s+1} ... a_j k_s) u_s
    S   = D_last S + sum_j (a_{j+1} ... a_last k_j) u_j^T      in the next pass
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from codegen._tvm import Buffer, Expr, PrimFunc
from codegen.kernels.base import Array, Isa, Kernel, Knobs
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
    serial,
)
from codegen.kernels.vector_math import exp
from ir.ops.recurrence import Decay, OuterScan
from ir.types import TensorType

KEYS_UNROLLED: Final = 4


@dataclass(frozen=True)
class DeltaScanKernel(Kernel):
    """`S_t = a_t S_{t-1} + beta_t k_t (v_t - (a_t S_{t-1})^T k_t)^T`, `o_t = scale * q_t^T S_t`.

    Operands: q and k `[B, T, H, K]`, v `[B, T, H, V]`, log decays g (`[B, T, H]` for `head`, `[B, T, H, K]` for `key`),
    beta `[B, T, H]`, the initial state `[B, H, K, V]` if there is one; out `[B, T, H, V]`, then the final state if
    wanted.

    Attributes:
        batch: Sequences.
        t: Steps of a sequence.
        heads: Heads.
        dk: Key size.
        dv: Value size.
        decay: `none`, `head` (one a head and step) or `key` (one a key element and step).
        scale: Factor of the output.
        initial_state: Whether the first state is an operand, zero otherwise.
        final_state: Whether the last state is an output.
    """

    batch: int
    t: int
    heads: int
    dk: int
    dv: int
    decay: Decay = "none"
    scale: float = 1.0
    initial_state: bool = False
    final_state: bool = False

    family: ClassVar[str] = "delta_scan"

    @property
    def op(self) -> OuterScan:
        """The graph operation that this computes."""
        return OuterScan(self.decay, self.scale, self.initial_state, delta=True)

    @property
    def inputs(self) -> tuple[TensorType, ...]:
        """Operands q, k, v, g, beta, initial state."""
        steps = (self.batch, self.t, self.heads)
        keys, values, each = TensorType((*steps, self.dk)), TensorType((*steps, self.dv)), TensorType(steps)
        gates = {"head": [each], "key": [keys]}.get(self.decay, [])
        state = [TensorType((self.batch, self.heads, self.dk, self.dv))] * self.initial_state
        return (keys, keys, values, *gates, each, *state)

    @property
    def outputs(self) -> tuple[TensorType, ...]:
        """The output and the final state."""
        return self.op.infer_types(self.inputs)[: 1 + self.final_state]

    @property
    def flops(self) -> int:
        """Decay, readout of keys and queries, and update of every state element at every step."""
        return self.op.flops(self.inputs, self.outputs)

    def knobs(self, isa: Isa) -> Knobs:
        """Hold what a block of steps reads and writes in registers: three vectors for each step and value vector."""
        vectors = ceil_div(self.dv, isa.lanes)
        steps = min(2, self.t)
        widest = max((isa.registers - isa.registers // 8) // (3 * steps), 1)
        parts = ceil_div(vectors, widest)
        units = self.batch * self.heads
        while parts < vectors and units * parts < 4 * isa.threads and units * parts % isa.threads:
            parts += 1
        return {"vectors": ceil_div(vectors, parts), "steps": steps}

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Return the rule's choice, then other widths and numbers of steps in one pass over the state."""
        space = [self.knobs(isa)]
        for steps in (1, 2, 3, 4):
            for vectors in range(1, min(8, ceil_div(self.dv, isa.lanes)) + 1):
                candidate = {"vectors": vectors, "steps": min(steps, self.t)}
                if candidate not in space:
                    space.append(candidate)
        return space

    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the scan."""
        return build_function(self, isa, knobs, lambda *buffers: _DeltaWriter(self, isa, knobs, buffers).write())

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Step through time in float64."""
        results = self.op.evaluate_all(tuple(np.asarray(array, np.float64) for array in arrays))
        return results[: 1 + self.final_state]


class _DeltaWriter:
    """Writes one scan; holds what every part of the loop nest needs."""

    def __init__(self, kernel: DeltaScanKernel, isa: Isa, knobs: Knobs, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.vec = kernel, Vectors(isa.lanes)
        self.q, self.k, self.v, *rest = buffers
        self.last_state = rest.pop() if kernel.final_state else None
        self.out = rest.pop()
        self.first_state = rest.pop() if kernel.initial_state else None
        self.beta = rest.pop()
        self.g = rest.pop() if kernel.decay != "none" else None
        self.steps = int(knobs["steps"])
        self.parts = Split(ceil_div(kernel.dv, isa.lanes), int(knobs["vectors"]))
        self.key_vectors = column_vectors(kernel.dk, isa.lanes)

    def write(self) -> None:
        """Loop over batch, heads and parts of the values."""
        kernel = self.kernel
        with parallel_block(kernel.batch * kernel.heads * self.parts.count, flops=kernel.flops) as unit:
            self.head = bind(unit // self.parts.count % kernel.heads)
            self.batch = bind(unit // (self.parts.count * kernel.heads))
            self.parts.for_each(unit % self.parts.count, self._part)

    def _part(self, first_vector: Index, vectors: int) -> None:
        """Scan some vectors of the values over all steps."""
        kernel, vec = self.kernel, self.vec
        self.vectors = vectors
        self.column = bind(first_vector * vec.lanes) if isinstance(first_vector, Expr) else first_vector * vec.lanes
        width = len(self.key_vectors) * vec.lanes
        self.state = scratch((kernel.dk, vectors * vec.lanes))
        self.read_k, self.read_q, self.kept = (scratch((self.steps, width)) for _ in range(3))
        self.decay = scratch((width,))
        self.written = [[vec.register(0.0) for _ in range(vectors)] for _ in range(self.steps)]
        with serial(0, kernel.dk) as i:
            for v in range(vectors):
                vec.store(self.state, self._initial(i, v), i, v * vec.lanes)
        for c in range(len(self.key_vectors)):
            vec.store(self.decay, vec.splat(1.0), c * vec.lanes)
            for step in range(self.steps):
                vec.store(self.kept, vec.splat(0.0), step, c * vec.lanes)
        full, rest = divmod(kernel.t, self.steps)
        with serial(0, full) as block:
            self._block(bind(block * self.steps), self.steps, self.steps)
        if rest:
            self._block(full * self.steps, rest, self.steps)
        if self.last_state is not None:
            self._for_each_key(lambda i: self._finish_key(i, rest or self.steps))

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

    def _finish_key(self, i: Index, pending: int) -> None:
        """Write one row of the last state."""
        assert self.last_state is not None
        for v, state in enumerate(self._updated(i, pending)):
            column = self.column + v * self.vec.lanes
            self.vec.store(self.last_state, state, self.batch, self.head, i, column, live=self._live(v))

    def _for_each_key(self, body: object) -> None:
        assert callable(body)
        unrolled, rest = divmod(self.kernel.dk, KEYS_UNROLLED)
        if unrolled:
            with serial(0, unrolled) as group:
                for i in range(KEYS_UNROLLED):
                    body(group * KEYS_UNROLLED + i)
        for i in range(self.kernel.dk - rest, self.kernel.dk):
            body(i)

    def _block(self, first: Index, steps: int, pending: int) -> None:
        """Advance some steps: prepare their keys and queries, pass over the state, let the steps act on each other."""
        vec = self.vec
        rows = [bind(first + s) if isinstance(first, Expr) else first + s for s in range(steps)]
        among_keys, among_queries, last_decay, kept = self._prepare(rows)
        found_k = [[vec.register(0.0) for _ in range(self.vectors)] for _ in rows]
        found_q = [[vec.register(0.0) for _ in range(self.vectors)] for _ in rows]
        self._for_each_key(lambda i: self._key(i, pending, found_k, found_q))
        self._keep(last_decay, kept)
        for j, row in enumerate(rows):
            beta = bind(vec.splat(self.beta[self.batch, row, self.head]))
            for v in range(self.vectors):
                column = self.column + v * vec.lanes
                value = vec.load(self.v, self.batch, row, self.head, column, live=self._live(v)) - found_k[j][v].get()
                for s in range(j):
                    value = value - vec.splat(among_keys[j][s]) * self.written[s][v].get()
                self.written[j][v].set(beta * value)
                out = found_q[j][v].get()
                for s in range(j + 1):
                    out = out + vec.splat(among_queries[j][s]) * self.written[s][v].get()
                vec.store(self.out, out, self.batch, row, self.head, column, live=self._live(v))

    def _prepare(
        self, rows: list[Index]
    ) -> tuple[list[list[Expr]], list[list[Expr]], list[Expr | None], list[list[Expr]]]:
        """Decay the keys and queries of a block to its start, and multiply them with the keys before them.

        Returns:
            For each step its key times each earlier one, and its scaled query times each up to its own; for each key
            vector the decay over the block; for each step and key vector the key decayed to the end of the block.
        """
        steps, columns = len(rows), len(self.key_vectors)
        among_keys = [[self.vec.register(0.0) for _ in range(j)] for j in range(steps)]
        among_queries = [[self.vec.register(0.0) for _ in range(j + 1)] for j in range(steps)]
        last_decay: list[Expr | None] = []
        kept: list[list[Expr]] = [[] for _ in rows]
        head_decays = [self._head_decay(row) for row in rows]
        for c in range(columns):
            earlier: list[Expr] = []  # keys so far, decayed to the current step
            since_start: Expr | None = None
            for j, row in enumerate(rows):
                key, query, decay = self._operands(row, c, head_decays[j])
                if decay is not None:
                    since_start = decay if since_start is None else bind(since_start * decay)
                    earlier = [bind(decay * other) for other in earlier]
                for s, other in enumerate(earlier):
                    among_keys[j][s].set(among_keys[j][s].get() + key * other)
                earlier.append(key)
                for s, other in enumerate(earlier):
                    among_queries[j][s].set(among_queries[j][s].get() + query * other)
                self._store_read(j, c, key, query, since_start)
            last_decay.append(since_start)
            for j, key in enumerate(earlier):
                kept[j].append(key)
        return (
            [[self._total(register) for register in line] for line in among_keys],
            [[self._total(register) for register in line] for line in among_queries],
            last_decay,
            kept,
        )

    def _operands(self, row: Index, c: int, head_decay: Expr | None) -> tuple[Expr, Expr, Expr | None]:
        """One vector of a step's key, scaled query and decay."""
        vec, live, column = self.vec, self.key_vectors[c], c * self.vec.lanes
        key = bind(vec.load(self.k, self.batch, row, self.head, column, live=live))
        query = vec.load(self.q, self.batch, row, self.head, column, live=live)
        query = bind(query * vec.splat(self.kernel.scale)) if self.kernel.scale != 1.0 else bind(query)
        if self.kernel.decay != "key" or self.g is None:
            return key, query, head_decay
        return key, query, bind(exp(vec.load(self.g, self.batch, row, self.head, column, live=live)))

    def _head_decay(self, row: Index) -> Expr | None:
        if self.kernel.decay != "head" or self.g is None:
            return None
        return bind(exp(self.vec.splat(self.g[self.batch, row, self.head])))

    def _store_read(self, j: int, c: int, key: Expr, query: Expr, since_start: Expr | None) -> None:
        column = c * self.vec.lanes
        self.vec.store(self.read_k, key if since_start is None else key * since_start, j, column)
        self.vec.store(self.read_q, query if since_start is None else query * since_start, j, column)

    def _total(self, register: Register) -> Expr:
        return bind(self.vec.reduce(register.get(), lambda a, b: a + b))

    def _keep(self, last_decay: list[Expr | None], kept: list[list[Expr]]) -> None:
        """Leave the decay and the keys of this block to the next pass over the state."""
        for c, decay in enumerate(last_decay):
            if decay is not None:
                self.vec.store(self.decay, decay, c * self.vec.lanes)
            for j, line in enumerate(kept):
                self.vec.store(self.kept, line[c], j, c * self.vec.lanes)

    def _updated(self, i: Index, pending: int) -> list[Expr]:
        """One row of the state after what the last block left."""
        vec = self.vec
        states = [vec.load(self.state, i, v * vec.lanes) for v in range(self.vectors)]
        if self.kernel.decay != "none":
            factor = bind(vec.splat(self.decay[i]))
            states = [state * factor for state in states]
        for j in range(pending):
            key = bind(vec.splat(self.kept[j, i]))
            states = [state + key * self.written[j][v].get() for v, state in enumerate(states)]
        return [bind(state) for state in states]

    def _key(self, i: Index, pending: int, found_k: list[list[Register]], found_q: list[list[Register]]) -> None:
        """Bring one row of the state up to date and add its share of what the block reads."""
        vec = self.vec
        states = self._updated(i, pending)
        for v, state in enumerate(states):
            vec.store(self.state, state, i, v * vec.lanes)
        for j, (line_k, line_q) in enumerate(zip(found_k, found_q, strict=True)):
            key, query = bind(vec.splat(self.read_k[j, i])), bind(vec.splat(self.read_q[j, i]))
            for state, sum_k, sum_q in zip(states, line_k, line_q, strict=True):
                sum_k.set(sum_k.get() + key * state)
                sum_q.set(sum_q.get() + query * state)
