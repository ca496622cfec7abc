"""Legendre memory unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, State, TokenMixer, option
from ir.op import Array
from ir.types import Axis, TensorType
from searchspaces import reference


class LegendreMemory(TokenMixer):
    """Legendre memory unit (Voelker et al. 2019), the mixer of LMUFormer (Liu et al. 2024).

    One signal u_t = relu(x_t w_u + b_u) is kept as the M Legendre coefficients of its last theta values:
    m_t = A m_{t-1} + B u_t, the exact step of theta m' = A' m + B' u with A'_ij = (2i + 1) * (-1 if i < j else
    (-1)^(i-j+1)) and B'_i = (2i + 1) (-1)^i, neither trained. h_t = relu([m_t, x_t] W_h + b_h); y_t = h_t W_out +
    b_out, followed by batch norm. All m_t at once are a convolution of u with B, A B, A^2 B, ... by Fourier transform:
    T log T. State: M.
    """

    paper = (
        "Liu et al. 2024, LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units, "
        "arXiv 2402.04882; Voelker et al. 2019, Legendre Memory Units, NeurIPS 32"
    )
    causality = "causal"
    growth = 1.1
    cases = (
        Case({"theta": 7.0}),
        Case({"order": 5, "theta": 4.0, "batch_norm": False}, batch=1, time=11, d_model=6),
        Case({"order": 1, "theta": 20.0}, time=3, d_model=5),
    )

    order: int | None = option(None, minimum=1, maximum=1024, doc="Coefficients M; null for the model width.")
    theta: float = option(128.0, minimum=1.0, maximum=1e6, doc="Tokens that the memory reaches back.")
    batch_norm: bool = option(True, doc="Batch norm after the last matrix.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        step, drive = (b.constant(array) for array in _matrices(self.order or x.shape[-1], self.theta))
        batch, tokens = x.shape[:2]
        signal = b.broadcast(self._signal(b, x), batch, tokens, drive.shape[0])
        return self._output(b, x, b.long_conv(signal, self._responses(b, step, drive, tokens)))

    def _signal(self, b: Builder, x: Tensor) -> Tensor:
        return b.relu(b.linear(x, "signal", (Axis("signal", 1),), bias=True))

    def _responses(self, b: Builder, step: Tensor, drive: Tensor, tokens: int) -> Tensor:
        """What is left in the memory t tokens after a one, `[T, M]`, by doubling; known when the model is compiled."""
        rows = b.reshape(drive, 1, drive.shape[0])
        while rows.shape[0] < tokens:
            rows = b.concat(0, rows, b.matmul(rows, step, transpose_b=True))
            step = b.matmul(step, step) if rows.shape[0] < tokens else step
        return rows if rows.shape[0] == tokens else b.slice(rows, 0, 0, tokens)

    def _output(self, b: Builder, x: Tensor, memory: Tensor) -> Tensor:
        d_model, hidden, order = Axis("d_model", x.shape[-1]), Axis("hidden", x.shape[-1]), memory.shape[-1]
        h = b.matmul(memory, b.parameter("from_memory", ((Axis("order", order),), (hidden,))))
        h = b.relu(h + b.linear(x, "from_input", (hidden,), bias=True))
        y = b.matmul(h, b.parameter("out", ((hidden,), (d_model,))))
        y = y + b.parameter("out_bias", ((d_model,),), "constant(0)")
        return b.batch_norm(y, "out_norm") if self.batch_norm else y

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        return {"memory": TensorType((batch, 1, self.order or d_model))}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        step, drive = (b.constant(array) for array in _matrices(self.order or x.shape[-1], self.theta))
        memory = b.matmul(state["memory"], step, transpose_b=True) + self._signal(b, x) * drive
        return self._output(b, x, memory), {"memory": memory}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        step, drive = _matrices(self.order or x.shape[-1], self.theta)
        u = np.maximum(x @ params["signal"] + params["signal_bias"], 0.0)
        memory, y = np.zeros((x.shape[0], drive.size)), np.zeros_like(x)
        for t in range(x.shape[1]):
            memory = np.einsum("bm,nm->bn", memory, step) + u[:, t] * drive
            h = memory @ params["from_memory"] + x[:, t] @ params["from_input"] + params["from_input_bias"]
            y[:, t] = np.maximum(h, 0.0) @ params["out"] + params["out_bias"]
        return reference.batch_norm(params, "out_norm", y) if self.batch_norm else y


@lru_cache(maxsize=64)
def _matrices(order: int, theta: float) -> tuple[Array, Array]:
    """A `[M, M]` and B `[M]` for a signal that is held for one token, in the precision in which a graph holds them."""
    i, j = np.indices((order, order))
    rates = (2.0 * np.arange(order) + 1.0) / theta
    whole = np.zeros((order + 1, order + 1))
    whole[:order, :order] = rates[:, None] * np.where(i < j, -1.0, (-1.0) ** (i - j + 1))
    whole[:order, order] = rates * (-1.0) ** np.arange(order)
    done = _exponential(whole)
    return done[:order, :order].astype(np.float32), done[:order, order].astype(np.float32)


def _exponential(matrix: Array) -> Array:
    """e to the power of a matrix, by the series of a small part of it, squared up again."""
    halvings = max(0, math.ceil(math.log2(max(float(np.abs(matrix).sum(axis=1).max()), 1e-9)))) + 2
    small = matrix / 2.0**halvings
    term = total = np.eye(matrix.shape[0])
    for k in range(1, 16):
        term = term @ small / k
        total = total + term
    return np.linalg.matrix_power(total, 2**halvings)
