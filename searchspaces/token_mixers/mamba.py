"""Mamba's selective state space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, State, TokenMixer, option
from ir.op import Array
from ir.ops.recurrence import FORMS, Form
from ir.types import Axis, TensorType
from searchspaces import reference
from searchspaces.convolutions import taps


class Mamba(TokenMixer):
    """Selective state space, S6 (Gu and Dao 2023), with its short convolution and gate.

    u = silu(conv(x W_input)) of width E = expand * D, the convolution causal and depthwise; z = x W_gate;
    B_t = u_t W_b and C_t = u_t W_c of size N; dt = softplus(u_t W_down W_up + bias); A = -exp(a_log) `[N, E]`.
    In each channel h_t[n] = exp(dt A[n]) h_{t-1}[n] + dt B_t[n] u_t and o_t = sum_n C_t[n] h_t[n] + skip u_t;
    y_t = (o_t * silu(z_t)) W_out. About 3 expand D^2 parameters. Linear in T.
    State: N E and the convolution's last inputs, (conv_width - 1) E.
    """

    paper = "Gu, Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv 2312.00752"
    aliases: ClassVar[Aliases] = {"s6": {}}
    causality = "causal"
    forms = FORMS
    cases = (
        Case({"state_dim": 3}),
        Case({"state_dim": 5, "expand": 1.5, "conv_width": 3, "dt_rank": 2}, batch=1, time=11, d_model=6),
        Case({"state_dim": 1, "conv_width": 5}, time=3, d_model=5),
    )

    state_dim: int = option(16, minimum=1, maximum=1024, doc="Size N of the state of each channel.")
    expand: float = option(2.0, minimum=0.1, maximum=16.0, doc="Inner width over model width.")
    conv_width: int = option(4, minimum=2, maximum=64, doc="Tokens that the convolution sees.")
    dt_rank: int | None = option(None, minimum=1, maximum=4096, doc="Rank of the step size's matrix; null for D / 16.")
    form: Form = option("auto", choices=FORMS, doc="How the recurrence is computed.")

    def _axes(self, d_model: int) -> tuple[Axis, Axis, Axis]:
        """Axes of inner width, state and rank of the step size."""
        rank = self.dt_rank or math.ceil(d_model / 16)
        return Axis("hidden", max(1, round(self.expand * d_model))), Axis("state", self.state_dim), Axis("rank", rank)

    def build(self, b: Builder, x: Tensor) -> Tensor:
        inner, *_ = self._axes(x.shape[-1])
        u, z = (b.linear(x, name, (inner,)) for name in ("input", "gate"))
        u = self._convolve(b, u, self.conv_width - 1)
        return self._output(b, self._scan(b, u, x.shape[-1], None)[0], z, x.shape[-1])

    def _convolve(self, b: Builder, u: Tensor, before: int) -> Tensor:
        """Convolution of u `[B, T, E]` with so many zeros before it, and its activation."""
        inner = Axis("hidden", u.shape[-1])
        weight = b.parameter("conv", ((taps(self.conv_width, causal=True),), (Axis("group", 1),), (inner,)))
        y = b.conv(u, weight, padding=((before, 0),), groups=inner.size)
        return b.silu(y + b.parameter("conv_bias", ((inner,),), "constant(0)"))

    def _scan(self, b: Builder, u: Tensor, d_model: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The state space over u `[B, T, E]`, with its skip, and the last state."""
        inner, state_axis, rank = self._axes(d_model)
        batch, tokens = u.shape[:2]
        k = b.matmul(u, b.parameter("b", ((inner,), (state_axis,))))
        q = b.matmul(u, b.parameter("c", ((inner,), (state_axis,))))
        low = b.matmul(u, b.parameter("dt_down", ((inner,), (rank,))))
        spread = rank.size**-0.5
        up = b.parameter("dt_up", ((rank,), (inner,)), f"uniform({-spread}, {spread})")
        bias = b.parameter("dt_bias", ((inner,),), "softplus_inverse_log_uniform(0.001, 0.1)")
        dt = b.softplus(b.matmul(low, up) + bias)
        rate = -b.exp(b.parameter("a_log", ((state_axis,), (inner,)), "log_arange"))
        q, k, v, g = (b.reshape(t, batch, tokens, 1, t.shape[-1]) for t in (q, k, dt * u, dt))
        rate = b.reshape(rate, 1, state_axis.size, inner.size)
        o, last = b.outer_scan(q, k, v, g, rate, decay="state", state=state, form=self.form)
        return b.reshape(o, *u.shape) + u * b.parameter("skip", ((inner,),), "constant(1)"), last

    def _output(self, b: Builder, o: Tensor, z: Tensor, d_model: int) -> Tensor:
        return b.matmul(
            o * b.silu(z), b.parameter("out", ((Axis("hidden", o.shape[-1]),), (Axis("d_model", d_model),)))
        )

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        inner, state_axis, _ = self._axes(d_model)
        return {
            "conv": TensorType((batch, self.conv_width - 1, inner.size)),
            "memory": TensorType((batch, 1, state_axis.size, inner.size)),
        }

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inner, *_ = self._axes(x.shape[-1])
        u, z = (b.linear(x, name, (inner,)) for name in ("input", "gate"))
        recent = b.concat(1, state["conv"], u)
        o, last = self._scan(b, self._convolve(b, recent, 0), x.shape[-1], state["memory"])
        newest = b.slice(recent, 1, x.shape[1], recent.shape[1])
        return self._output(b, o, z, x.shape[-1]), {"conv": newest, "memory": last}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        u, z = x @ params["input"], x @ params["gate"]
        convolved = np.zeros_like(u) + params["conv_bias"]
        for t in range(u.shape[1]):
            for back in range(min(self.conv_width, t + 1)):
                convolved[:, t] += params["conv"][self.conv_width - 1 - back, 0] * u[:, t - back]
        u = reference.silu(convolved)
        dt = reference.softplus(u @ params["dt_down"] @ params["dt_up"] + params["dt_bias"])
        a = -np.exp(params["a_log"])
        h, o = np.zeros((u.shape[0], *a.shape)), np.zeros_like(u)
        for t in range(u.shape[1]):
            b_t, c_t = u[:, t] @ params["b"], u[:, t] @ params["c"]
            h = np.exp(dt[:, t, None, :] * a) * h + b_t[:, :, None] * (dt[:, t] * u[:, t])[:, None, :]
            o[:, t] = np.einsum("bn,bne->be", c_t, h) + params["skip"] * u[:, t]
        return (o * reference.silu(z)) @ params["out"]
