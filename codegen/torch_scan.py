"""Linear recurrences in torch: the same outputs by stepping, by chunks, or by a scan over all of time.

Shape letters: B batch, T time, H heads, K key size, V value size, N chunks, C steps of a chunk.
Training uses the chunkwise form, which is made of matrix products; the state decay of Mamba has none and steps instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ir.ops.recurrence import OuterScan

_KEY_CHUNK = 16
"""Steps of a chunk with a decay for each key channel: its `[C, C, K]` block of decays is held whole."""


_STATE_BLOCK = 8
"""Steps of the selective scan that are prepared together."""


class _Scan(torch.autograd.Function):
    """s_t = a_t * s_{t-1} + b_t along the first axis; a broadcasts to b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        states = torch.empty_like(b)
        states[0] = b[0]
        for t in range(1, b.shape[0]):
            torch.addcmul(b[t], a[t], states[t - 1], out=states[t])
        ctx.save_for_backward(a, states)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Run the adjoint recurrence backwards: ds_t = grad_t + a_{t+1} * ds_{t+1}."""
        a, states = ctx.saved_tensors
        grad_b = grads[0].clone(memory_format=torch.contiguous_format)
        for t in range(grad_b.shape[0] - 2, -1, -1):
            grad_b[t].addcmul_(a[t + 1], grad_b[t + 1])
        grad_a = torch.zeros_like(grad_b)
        torch.mul(grad_b[1:], states[:-1], out=grad_a[1:])
        return grad_a.sum_to_size(a.shape), grad_b


def scan_first_axis(a: Tensor, b: Tensor) -> Tensor:
    """Every state of s_t = a_t * s_{t-1} + b_t with s_{-1} = 0.

    Args:
        a: Decays `[T, ...]`, broadcastable to b.
        b: Updates `[T, ...]`.
    """
    result: Tensor = _Scan.apply(a, b)  # type: ignore[assignment]  # autograd.Function.apply is untyped
    return result


def outer_scan(op: OuterScan, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """Compute an `OuterScan` in the form it asks for.

    `auto` is chunkwise; for the state decay it is recurrent, or parallel under torch.compile, which unrolls every step.
    """
    initial = rest[-1] if op.has_state else None
    form = op.form
    if form == "auto" and op.decay == "state":
        form = "parallel" if torch.compiler.is_compiling() else "recurrent"
    elif form == "auto":
        form = "chunkwise"
    if op.decay == "state":
        return _state_decay(op, form, q, k, v, rest[0], rest[1], initial)
    gates = rest[0] if op.decay != "none" else None
    if op.delta and form == "recurrent":
        return _delta_chunks(op, 1, q, k, v, gates, rest[-2 if op.has_state else -1], initial)
    if form == "recurrent":
        return _recurrent(op, q, k, v, _decays(op, rest), initial)
    chunk = q.shape[1] if form == "parallel" else min(op.chunk, _KEY_CHUNK if op.decay == "key" else op.chunk)
    if op.delta:
        return _delta_chunks(op, chunk, q, k, v, gates, rest[-2 if op.has_state else -1], initial)
    return _chunkwise(op, chunk, q, k, v, gates, initial)


def _decays(op: OuterScan, rest: tuple[Tensor, ...]) -> Tensor | None:
    """Decays `[T, B, H, K or 1, 1]` of the recurrent form."""
    if op.decay == "none":
        return None
    gates = rest[0] if op.decay == "key" else rest[0].unsqueeze(-1)
    return gates.exp().unsqueeze(-1).transpose(0, 1)


def _recurrent(
    op: OuterScan, q: Tensor, k: Tensor, v: Tensor, decay_T: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    updates_TBHKV = (k.unsqueeze(-1) * v.unsqueeze(-2)).transpose(0, 1)
    if decay_T is None:
        states_TBHKV = updates_TBHKV.cumsum(0) + (0.0 if initial is None else initial)
    else:
        states_TBHKV = scan_first_axis(decay_T, _with_initial(updates_TBHKV, decay_T, initial))
    return op.scale * torch.einsum("bthk,tbhkv->bthv", q, states_TBHKV), states_TBHKV[-1]


def _with_initial(updates: Tensor, decays: Tensor, initial: Tensor | None) -> Tensor:
    """Updates whose first one already carries the decayed initial state."""
    if initial is None:
        return updates.contiguous()
    return torch.cat([updates[:1] + decays[:1] * initial, updates[1:]])


def _chunkwise(
    op: OuterScan, chunk: int, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Matrix products inside each chunk and a short recurrence between chunks (Yang et al. 2023, section 4)."""
    steps = q.shape[1]
    q_BNCHK, k_BNCHK, v_BNCHV = (_in_chunks(x, chunk) for x in (q, k, v))
    if gates is None:
        total = since_end = None
    else:
        total = _in_chunks(gates if op.decay == "key" else gates.unsqueeze(-1), chunk).cumsum(2)
        since_end = total[:, :, -1:] - total
    scores_BNHCS = _scores(op, q_BNCHK, k_BNCHK, total)
    inside = torch.einsum("bnhcs,bnshv->bnchv", scores_BNHCS, v_BNCHV)
    kept = k_BNCHK if since_end is None else k_BNCHK * since_end.exp()
    added_NBHKV = torch.einsum("bnchk,bnchv->nbhkv", kept, v_BNCHV)
    before_NBHKV, last = _between_chunks(added_NBHKV, total, initial)
    read = q_BNCHK if total is None else q_BNCHK * total.exp()
    carried = torch.einsum("bnchk,nbhkv->bnchv", read, before_NBHKV)
    return op.scale * (inside + carried).flatten(1, 2)[:, :steps], last


def _delta_chunks(
    op: OuterScan,
    chunk: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor | None,
    beta: Tensor,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The delta rule in the WY form of a chunk (Yang et al. 2024, section 3.2); a chunk of one step is the recurrence.

    Step c of a chunk writes u_c = beta_c (v_c - k_c^T S - sum_{s<c} (k_c k_s) u_s), all under decay, S being the state
    before the chunk. The sum is a triangular system: its solution is linear in S, so most of it needs no S yet.
    """
    q_BNHCK, k_BNHCK, v_BNHCV, beta_BNHC1 = (
        _in_chunks(x, chunk).transpose(2, 3) for x in (q, k, v, beta.unsqueeze(-1))
    )
    read_q = q_BNHCK
    read_k = kept = k_BNHCK
    total = decay_BNHK1 = None
    if gates is not None:
        total = _in_chunks(gates if op.decay == "key" else gates.unsqueeze(-1), chunk).cumsum(2)
        total_BNHCK = total.transpose(2, 3)
        read_q, read_k = q_BNHCK * total_BNHCK.exp(), k_BNHCK * total_BNHCK.exp()
        kept = k_BNHCK * (total_BNHCK[..., -1:, :] - total_BNHCK).exp()
        decay_BNHK1 = total_BNHCK[..., -1, :, None].exp()
    by_step = k_BNHCK.transpose(2, 3)
    system = beta_BNHC1 * _scores(op, by_step, by_step, total)
    sides = beta_BNHC1 * torch.cat([v_BNHCV, read_k], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    fresh, reading = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores_BNHCS = _scores(op, q_BNHCK.transpose(2, 3), by_step, total)
    state_BHKV = k.new_zeros(*q_BNHCK.shape[0:3:2], k.shape[-1], v.shape[-1]) if initial is None else initial
    outputs: list[Tensor] = []
    for n in range(q_BNHCK.shape[1]):
        written = fresh[:, n] - reading[:, n] @ state_BHKV
        outputs.append(read_q[:, n] @ state_BHKV + scores_BNHCS[:, n] @ written)
        remembered = state_BHKV if decay_BNHK1 is None else decay_BNHK1[:, n] * state_BHKV
        state_BHKV = remembered + kept[:, n].mT @ written
    output_BTHV = torch.stack(outputs, 1).transpose(2, 3).flatten(1, 2)[:, : q.shape[1]]
    return op.scale * output_BTHV, state_BHKV


def _scores(op: OuterScan, q_BNCHK: Tensor, k_BNCHK: Tensor, total: Tensor | None) -> Tensor:
    """Products of queries with keys up to their own step `[B, N, H, C, S]`, under the decay between the two."""
    if total is None:
        return torch.einsum("bnchk,bnshk->bnhcs", q_BNCHK, k_BNCHK).tril()
    return _decayed_scores(op, q_BNCHK, k_BNCHK, total)


def _in_chunks(x: Tensor, chunk: int) -> Tensor:
    """`[B, T, ...]` to `[B, N, C, ...]`, zero-padded: a padded step neither adds to nor decays the state."""
    missing = -x.shape[1] % chunk
    if missing:
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, missing])
    return x.unflatten(1, (-1, chunk))


def _decayed_scores(op: OuterScan, q_BNCHK: Tensor, k_BNCHK: Tensor, total: Tensor) -> Tensor:
    """sum_k q[c, k] k[s, k] exp(total[c, k] - total[s, k]) for s <= c, no exponent ever positive."""
    chunk = q_BNCHK.shape[2]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q_BNCHK.device).triu(1)
    if op.decay == "head":
        total_BNHC = total.squeeze(-1).transpose(2, 3)
        apart = total_BNHC.unsqueeze(-1) - total_BNHC.unsqueeze(-2)
        products = torch.einsum("bnchk,bnshk->bnhcs", q_BNCHK, k_BNCHK)
        return products * apart.masked_fill(later, -torch.inf).exp()
    total_BNHCK, q_BNHCK, k_BNHCK = (x.transpose(2, 3) for x in (total, q_BNCHK, k_BNCHK))
    apart = (total_BNHCK.unsqueeze(-2) - total_BNHCK.unsqueeze(-3)).masked_fill(later.unsqueeze(-1), -torch.inf)
    weighted = apart.exp() * k_BNHCK.unsqueeze(-3)
    return (weighted @ q_BNHCK.unsqueeze(-1)).squeeze(-1)


def _between_chunks(added_NBHKV: Tensor, total: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """State before each chunk, and after the last."""
    if total is None:
        after = added_NBHKV.cumsum(0) + (0.0 if initial is None else initial)
    else:
        decay_NBHK1 = total[:, :, -1].exp().unsqueeze(-1).transpose(0, 1)
        after = scan_first_axis(decay_NBHK1, _with_initial(added_NBHKV, decay_NBHK1, initial))
    first = torch.zeros_like(after[:1]) if initial is None else initial.unsqueeze(0)
    return torch.cat([first, after[:-1]]), after[-1]


def _state_decay(
    op: OuterScan, form: str, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, rate: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The selective scan: a decay for each cell of the state."""
    if form == "recurrent":
        first = v.new_zeros(v.shape[0], *rate.shape) if initial is None else initial
        by_time = (x.transpose(0, 1).contiguous() for x in (op.scale * q, k, v, gates))
        output_TBHV, last = _StateScan.apply(*by_time, rate, first)  # type: ignore[misc]  # apply is untyped
        return output_TBHV.transpose(0, 1), last
    decay_TBHKV = (gates.transpose(0, 1).unsqueeze(-2) * rate).exp()
    updates_TBHKV = (k.unsqueeze(-1) * v.unsqueeze(-2)).transpose(0, 1)
    updates_TBHKV = _with_initial(updates_TBHKV, decay_TBHKV, initial)
    if form == "parallel":
        states = _doubling_scan(decay_TBHKV, updates_TBHKV)
    else:
        states = _chunked_scan(decay_TBHKV, updates_TBHKV, op.chunk)
    return op.scale * torch.einsum("bthk,tbhkv->bthv", q, states), states[-1]


class _StateScan(torch.autograd.Function):
    """The selective scan, a few steps at a time so that they stay in the cache; decays are computed again going back.

    All operands have time first: q and k `[T, B, H, K]`, v and gates `[T, B, H, V]`.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, rate: Tensor, initial: Tensor
    ) -> tuple[Tensor, Tensor]:
        states = torch.empty(q.shape[0] + 1, *initial.shape, dtype=v.dtype, device=v.device)
        states[0] = initial
        outputs = torch.empty_like(v)
        for start in range(0, q.shape[0], _STATE_BLOCK):
            block = slice(start, start + _STATE_BLOCK)
            decays = (gates[block].unsqueeze(-2) * rate).exp_()
            after = states[start + 1 : start + 1 + len(decays)]
            torch.mul(k[block].unsqueeze(-1), v[block].unsqueeze(-2), out=after)
            for step, decay in enumerate(decays):
                after[step].addcmul_(decay, states[start + step])
            outputs[block] = (q[block].unsqueeze(-2) @ after).squeeze(-2)
        ctx.save_for_backward(q, k, v, gates, rate, states)
        return outputs, states[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Carry the gradient of the state backwards through the same blocks."""
        q, k, v, gates, rate, states = ctx.saved_tensors
        grad_output, carried = grads
        grad_q, grad_k, grad_v, grad_gates = (torch.empty_like(x) for x in (q, k, v, gates))
        grad_rate = torch.zeros_like(rate)
        for start in reversed(range(0, q.shape[0], _STATE_BLOCK)):
            block = slice(start, start + _STATE_BLOCK)
            decays = (gates[block].unsqueeze(-2) * rate).exp_()
            steps = len(decays)
            grad_states = q[block].unsqueeze(-1) * grad_output[block].unsqueeze(-2)
            grad_states[-1] += carried
            for step in range(steps - 2, -1, -1):
                grad_states[step].addcmul_(decays[step + 1], grad_states[step + 1])
            grad_q[block] = (states[start + 1 : start + 1 + steps] @ grad_output[block].unsqueeze(-1)).squeeze(-1)
            grad_k[block] = (grad_states @ v[block].unsqueeze(-1)).squeeze(-1)
            grad_v[block] = (k[block].unsqueeze(-2) @ grad_states).squeeze(-2)
            kept = grad_states.mul_(decays)
            carried = kept[0].clone()
            grad_exponents = kept.mul_(states[start : start + steps])
            grad_gates[block] = (grad_exponents * rate).sum(-2)
            grad_rate += grad_exponents.mul_(gates[block].unsqueeze(-2)).sum((0, 1))
        return grad_q, grad_k, grad_v, grad_gates, grad_rate, carried


def _doubling_scan(a: Tensor, b: Tensor) -> Tensor:
    """Inclusive scan in log2(T) sweeps (Hillis and Steele 1986)."""
    reach = 1
    while reach < a.shape[0]:
        b = torch.cat([b[:reach], b[reach:] + a[reach:] * b[:-reach]])
        a = torch.cat([a[:reach], a[reach:] * a[:-reach]])
        reach *= 2
    return b


def _chunked_scan(a: Tensor, b: Tensor, chunk: int) -> Tensor:
    """Step all chunks side by side from zero, then carry the true state from chunk to chunk."""
    steps, missing = a.shape[0], -a.shape[0] % chunk
    if missing:
        a = torch.cat([a, torch.ones_like(a[:1]).expand(missing, *a.shape[1:])])
        b = torch.cat([b, torch.zeros_like(b[:1]).expand(missing, *b.shape[1:])])
    a_CN, b_CN = (x.unflatten(0, (-1, chunk)).transpose(0, 1) for x in (a, b))
    local_CN = scan_first_axis(a_CN, b_CN)
    product_CN = a_CN.cumprod(0)
    after_N = scan_first_axis(product_CN[-1], local_CN[-1])
    before_N = torch.cat([torch.zeros_like(after_N[:1]), after_N[:-1]])
    return (local_CN + product_CN * before_N).transpose(0, 1).flatten(0, 1)[:steps]
