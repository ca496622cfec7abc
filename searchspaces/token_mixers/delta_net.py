"""Linear attention by the delta rule, with or without a decay."""

from __future__ import annotations

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

_EPSILON = 1e-6  # keeps the length of a zero key from dividing by zero


class DeltaNet(TokenMixer):
    """DeltaNet (Yang et al. 2024): a matrix state that is corrected towards each value instead of adding it.

    q, k, v = silu(conv(x W)), causal depthwise convolutions over `conv_width` tokens; q and k have length 1 in each of
    H heads of size K = expand_k * D / H, values have size V = expand_v * D / H; b_t = sigmoid(x_t W_b).
    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T, o_t = S_t^T q_t / sqrt(K),
    y_t = concat_h(rms_norm(o_t)) W_out.
    a_t is 1, or if `gated` (Gated DeltaNet) exp(-e^A softplus(x_t W_a + c)) with one number A and c a head, and the
    norm is multiplied by silu(x_t W_g). Linear in T. State: H K V and the convolutions' last inputs.
    """

    paper = (
        "Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule, arXiv 2406.06484; "
        "Yang et al. 2025, Gated Delta Networks, arXiv 2412.06464"
    )
    aliases: ClassVar[Aliases] = {"gated_delta_net": {"gated": True}}
    causality = "causal"
    forms = FORMS
    cases = (
        Case({"num_heads": 3}),
        Case({"num_heads": 2, "gated": True, "expand_v": 2.0}, batch=1, time=11),
        Case({"num_heads": 1, "gated": True, "expand_k": 0.8, "conv_width": 2}, time=3, d_model=5),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    gated: bool = option(False, doc="Let the state decay, and gate the output.")
    expand_k: float = option(1.0, minimum=0.01, maximum=16.0, doc="Width of all keys over model width.")
    expand_v: float = option(1.0, minimum=0.01, maximum=16.0, doc="Width of all values over model width.")
    conv_width: int = option(4, minimum=2, maximum=64, doc="Tokens that the convolutions see.")
    form: Form = option("auto", choices=FORMS, doc="How the recurrence is computed.")

    def check(self, d_model: int) -> str | None:
        for name, expand in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
            width = round(expand * d_model)
            if width < 1 or width % self.num_heads:
                return f"num_heads {self.num_heads} does not divide {name} * d_model = {width}"
        return None

    def _axes(self, d_model: int) -> dict[str, tuple[Axis, Axis]]:
        """Heads and head size of each projection."""
        heads = Axis("heads", self.num_heads)
        key, value = (round(expand * d_model) // self.num_heads for expand in (self.expand_k, self.expand_v))
        return {
            "q": (heads, Axis("key_dim", key)),
            "k": (heads, Axis("key_dim", key)),
            "v": (heads, Axis("value_dim", value)),
        }

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return self._mix(b, x, None)[0]

    def _mix(self, b: Builder, x: Tensor, state: Mapping[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        axes, after = self._axes(x.shape[-1]), dict[str, Tensor]()
        made: dict[str, Tensor] = {}
        for name in ("q", "k", "v"):
            made[name], after[f"{name}_recent"] = self._convolved(b, x, name, axes[name], state)
        q, k = (self._unit(b, made[name]) for name in ("q", "k"))
        heads, value_dim = axes["v"]
        beta = b.sigmoid(b.linear(x, "beta", (heads,)))
        gates: list[Tensor] = []
        if self.gated:
            rate = b.softplus(b.linear(x, "decay", (heads,)) + b.parameter("decay_bias", ((heads,),), "uniform(-4,-1)"))
            gates.append(-(rate * b.exp(b.parameter("decay_rate", ((heads,),), "uniform(0,2.7)"))))
        o, after["memory"] = b.outer_scan(
            q,
            k,
            made["v"],
            *gates,
            decay="head" if self.gated else "none",
            scale=q.shape[-1] ** -0.5,
            beta=beta,
            state=state["memory"] if state else None,
            form=self.form,
        )
        o = b.merge_heads(b.rms_norm(o, b.parameter("norm", ((value_dim,),), "constant(1)")))
        o = o * b.silu(b.linear(x, "gate", (heads, value_dim))) if self.gated else o
        return b.matmul(o, b.parameter("out", ((heads, value_dim), (Axis("d_model", x.shape[-1]),)))), after

    def _convolved(
        self, b: Builder, x: Tensor, name: str, axes: tuple[Axis, Axis], state: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Heads of a projection after its convolution, and the convolution's last inputs."""
        y = b.linear(x, name, axes)
        kernel = b.parameter(f"{name}_conv", ((taps(self.conv_width, causal=True),), (Axis("group", 1),), axes))
        before = self.conv_width - 1
        whole = b.concat(1, state[f"{name}_recent"], y) if state else b.pad(y, 1, before, 0)
        recent = b.slice(whole, 1, whole.shape[1] - before, whole.shape[1])
        return b.split_heads(b.silu(b.conv(whole, kernel, groups=y.shape[-1])), self.num_heads), recent

    def _unit(self, b: Builder, x: Tensor) -> Tensor:
        return x * b.rsqrt(b.sum(b.square(x), -1, keepdims=True) + _EPSILON)

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        axes = self._axes(d_model)
        memory = TensorType((batch, self.num_heads, axes["k"][1].size, axes["v"][1].size))
        widths = {name: heads.size * size.size for name, (heads, size) in axes.items()}
        recent = {f"{name}_recent": TensorType((batch, self.conv_width - 1, width)) for name, width in widths.items()}
        return {"memory": memory, **recent}

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._mix(b, x, state)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        made: dict[str, Array] = {}
        for name in ("q", "k", "v"):
            y = x @ params[name]
            c = np.zeros_like(y)
            for t in range(y.shape[1]):
                for w in range(self.conv_width):
                    if t + w - self.conv_width + 1 >= 0:
                        c[:, t] += params[f"{name}_conv"][w, 0] * y[:, t + w - self.conv_width + 1]
            made[name] = reference.split_heads(reference.silu(c), self.num_heads)
        q, k = (made[name] / np.sqrt((made[name] ** 2).sum(-1, keepdims=True) + _EPSILON) for name in ("q", "k"))
        v, beta, a = made["v"], reference.sigmoid(x @ params["beta"]), np.ones((*x.shape[:2], self.num_heads))
        if self.gated:
            rate = reference.softplus(x @ params["decay"] + params["decay_bias"])
            a = np.exp(-np.exp(params["decay_rate"]) * rate)
        memory, o = np.zeros((x.shape[0], self.num_heads, k.shape[-1], v.shape[-1])), np.zeros_like(v)
        for t in range(x.shape[1]):
            memory = a[:, t, :, None, None] * memory
            lacking = v[:, t] - np.einsum("bhkv,bhk->bhv", memory, k[:, t])
            memory = memory + beta[:, t, :, None, None] * k[:, t, :, :, None] * lacking[:, :, None, :]
            o[:, t] = np.einsum("bhkv,bhk->bhv", memory, q[:, t]) / k.shape[-1] ** 0.5
        o = reference.merge_heads(reference.rms_norm(o) * params["norm"])
        o = o * reference.silu(x @ params["gate"]) if self.gated else o
        return o @ params["out"]
