"""Hierarchically gated recurrent network."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Case, State, TokenMixer, option
from ir.op import Array
from ir.types import Axis, TensorType
from searchspaces import reference


class Hgrn(TokenMixer):
    """HGRN (Qin et al. 2023): a vector state that forgets and takes in by one gate.

    f_t = l + (1 - l) sigmoid(x_t W_f), h_t = f_t * h_{t-1} + (1 - f_t) * silu(x_t W_c), all of width E = expand * D;
    y_t = (rms_norm(h_t) * silu(x_t W_g)) W_out. The lower bound l of the gate is an option: the paper lets it grow from
    layer to layer, so that later layers remember longer. Linear in T. State: E.
    """

    paper = "Qin et al. 2023, Hierarchically Gated Recurrent Neural Network for Sequence Modeling, arXiv 2311.04823"
    causality = "causal"
    cases = (
        Case(),
        Case({"lower_bound": 0.75, "expand": 1.5}, batch=1, time=11, d_model=6),
        Case({"lower_bound": 0.25}, time=3, d_model=5),
    )

    expand: float = option(1.0, minimum=0.1, maximum=16.0, doc="Width of the state over model width.")
    lower_bound: float = option(0.0, minimum=0.0, maximum=0.999, doc="Smallest share of the state that stays.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        f, c = self._gates(b, x)
        return self._output(b, x, b.linear_scan(f, (1.0 - f) * c))

    def _gates(self, b: Builder, x: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the state that stays, and what comes in, `[B, T, E]` each."""
        hidden = Axis("hidden", max(1, round(self.expand * x.shape[-1])))
        f = b.sigmoid(b.linear(x, "forget", (hidden,))) * (1.0 - self.lower_bound) + self.lower_bound
        return f, b.silu(b.linear(x, "in", (hidden,)))

    def _output(self, b: Builder, x: Tensor, h: Tensor) -> Tensor:
        hidden = Axis("hidden", h.shape[-1])
        h = b.rms_norm(h, b.parameter("norm", ((hidden,),), "constant(1)")) * b.silu(b.linear(x, "gate", (hidden,)))
        return b.matmul(h, b.parameter("out", ((hidden,), (Axis("d_model", x.shape[-1]),))))

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        return {"h": TensorType((batch, 1, max(1, round(self.expand * d_model))))}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        f, c = self._gates(b, x)
        h = f * state["h"] + (1.0 - f) * c
        return self._output(b, x, h), {"h": h}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        f = self.lower_bound + (1.0 - self.lower_bound) * reference.sigmoid(x @ params["forget"])
        c = reference.silu(x @ params["in"])
        h, state = np.zeros_like(f), np.zeros_like(f[:, 0])
        for t in range(x.shape[1]):
            state = f[:, t] * state + (1.0 - f[:, t]) * c[:, t]
            h[:, t] = state
        return (reference.rms_norm(h) * params["norm"] * reference.silu(x @ params["gate"])) @ params["out"]
