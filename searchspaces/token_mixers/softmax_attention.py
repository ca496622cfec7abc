"""Softmax attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, Limit, Position, State, TokenMixer, context_option, option
from ir.errors import GraphError
from ir.op import Array
from ir.ops.attention import NORMALISERS, Normaliser
from ir.types import Axis, TensorType
from searchspaces import reference, registry, token_parameters
from searchspaces.convolutions import taps

_HIDDEN = -1e9  # added to scores of slots that hold no key yet


def _convolved(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """The projections as the newest tap of their convolutions leaves them."""
    return {**params, **{name: params[name] * params[f"{name}_conv"][-1, 0] for name in ("q", "k", "v")}}


class SoftmaxAttention(TokenMixer):
    """Multi-head softmax attention (Vaswani et al. 2017), keys and values shared by groups of heads (Ainslie 2023).

    o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s in each of H heads of size K, head h reading keys and values of group
    h // (H / G); y = concat_h(o) W_out. `num_kv_heads` G is H for multi-head, 1 for multi-query attention. `window` w
    keeps keys with |t - s| < w; `qk_norm` norms each query and key (Henry et al. 2020, here by root mean square).
    `conv_size` w sends each channel of q, k and v through its own convolution over w tokens, up to t if causal, else
    around t (So et al. 2021, multi-dconv-head attention).

    `normaliser` makes the weights of scores x: softmax; sigmoid(x + shift) (Ramapuram et al. 2024); or
    clip((high - low) softmax(x) + low, 0, 1), which can be zero (Bondarenko et al. 2023). `gate` multiplies head h by
    sigmoid(x_t W_h + bias): one number a head or one a channel (Qiu et al. 2025); `gate_bias` is where the bias begins.
    `parameter_tokens` n puts an attention to n learned keys and values in place of each matrix (Wang et al. 2024).
    2 D K (H + G) parameters, D H or D H K more with a gate, w K (H + 2 G) with convolutions.
    State: keys and values, 2 L G K; T^2 in tokens, T w with a window, whose state is 2 (w - 1) G K. Convolutions add
    their last w - 1 inputs.
    """

    paper = (
        "Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762; Ainslie et al. 2023, GQA, arXiv 2305.13245; "
        "Henry et al. 2020, Query-Key Normalization for Transformers, arXiv 2010.04245; "
        "So et al. 2021, Primer, arXiv 2109.08668; "
        "Bondarenko et al. 2023, Quantizable Transformers, arXiv 2306.12929; "
        "Ramapuram et al. 2024, Theory, Analysis, and Best Practices for Sigmoid Self-Attention, arXiv 2409.04431; "
        "Wang et al. 2024, TokenFormer, arXiv 2410.23168; "
        "Qiu et al. 2025, Gated Attention for Large Language Models, arXiv 2505.06708"
    )
    aliases: ClassVar[Aliases] = {
        "attention": {},
        "multi_query_attention": {"num_kv_heads": 1},
        "mqa": {"num_kv_heads": 1},
        "multi_dconv_head_attention": {"conv_size": 3},
        "mdha": {"conv_size": 3},
        "sigmoid_attention": {"normaliser": "sigmoid"},
    }
    growth = 2.0
    cases = (
        Case({"num_heads": 3, "causal": True}),
        Case({"num_heads": 3, "causal": False}),
        Case({"num_heads": 2, "num_kv_heads": 1, "causal": True, "bias": True, "window": 3}),
        Case({"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "causal": True, "position": "rope"}),
        Case({"num_heads": 6, "num_kv_heads": 1, "causal": True, "position": "alibi", "window": 3}),
        Case(
            {"num_heads": 3, "causal": True, "qk_norm": True, "gate": "head", "position": "rope", "window": 4},
            time=9,
        ),
        Case({"num_heads": 3, "causal": False, "position": "alibi", "gate": "head"}, batch=1, time=5),
        Case({"num_heads": 1, "head_dim": 5, "causal": False, "qk_norm": True, "window": 2}, time=1, d_model=7),
        Case({"num_heads": 2, "num_kv_heads": 1, "head_dim": 3, "gate": "elementwise", "gate_bias": 1.0}, d_model=5),
        Case({"num_heads": 3, "num_kv_heads": 1, "conv_size": 3, "bias": True, "position": "rope"}),
        Case({"num_heads": 2, "conv_size": 2, "window": 3}, batch=1, time=9, d_model=6),
        Case({"num_heads": 2, "conv_size": 4, "causal": False}, batch=1, time=3, d_model=6),
        Case({"num_heads": 3, "normaliser": "sigmoid", "sigmoid_shift": -1.5, "window": 3}),
        Case({"num_heads": 3, "normaliser": "sigmoid", "causal": False, "position": "alibi"}, batch=1),
        Case({"num_heads": 3, "normaliser": "clipped_softmax", "clip_low": -0.2, "clip_high": 1.1}),
        Case({"num_heads": 2, "normaliser": "clipped_softmax", "clip_low": -0.1, "causal": False, "gate": "head"}),
        Case({"num_heads": 3, "parameter_tokens": 5, "position": "rope"}),
        Case({"num_heads": 2, "num_kv_heads": 1, "head_dim": 3, "parameter_tokens": 7, "causal": False}, time=3),
    )
    limits = (
        Limit(
            "a window over all tokens is full attention",
            Case({"num_heads": 3, "causal": False, "window": 7}),
            "softmax_attention",
            {"num_heads": 3, "causal": False},
        ),
        Limit(
            "a softmax stretched from 0 to 1 is the softmax",
            Case({"num_heads": 3, "normaliser": "clipped_softmax"}),
            "softmax_attention",
            {"num_heads": 3},
        ),
        Limit(
            "a gate per head that is wide open is none",
            Case({"num_heads": 3, "gate": "head", "gate_bias": 0.0}),
            "softmax_attention",
            {"num_heads": 3},
            values={"gate": 0.0, "gate_bias": 60.0},
        ),
        Limit(
            "a gate per channel that is wide open is none",
            Case({"num_heads": 3, "gate": "elementwise", "gate_bias": 0.0}),
            "softmax_attention",
            {"num_heads": 3},
            values={"gate": 0.0, "gate_bias": 60.0},
        ),
        Limit(
            "the sigmoid of a large score weighs a single key as the softmax does",
            Case({"num_heads": 3, "normaliser": "sigmoid", "sigmoid_shift": 60.0}, time=1),
            "softmax_attention",
            {"num_heads": 3},
        ),
        Limit(
            "convolutions over a single token scale the projections",
            Case({"num_heads": 3, "conv_size": 3}, time=1),
            "softmax_attention",
            {"num_heads": 3},
            adapt=_convolved,
        ),
        Limit(
            "parameter tokens taken twice change nothing",
            Case({"num_heads": 3, "parameter_tokens": 5}),
            "softmax_attention",
            {"num_heads": 3, "parameter_tokens": 10},
            adapt=lambda params: token_parameters.doubled(params, "q", "k", "v", "out"),
        ),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Query heads.")
    num_kv_heads: int | None = option(None, minimum=1, doc="Heads of keys and values; null for as many as of queries.")
    head_dim: int | None = option(None, minimum=1, doc="Size of a head; null for d_model / num_heads.")
    window: int = option(0, minimum=0, doc="Tokens that attend each other, |t - s| < window; 0 for all.")
    qk_norm: bool = option(False, doc="Norm each query and key.")
    conv_size: int = option(0, minimum=0, maximum=64, doc="Tokens that convolutions of q, k and v see; 0 for none.")
    parameter_tokens: int = option(
        0,
        minimum=0,
        maximum=65536,
        doc="Learned keys and values in place of each matrix of q, k, v and the output; 0: none.",
    )
    normaliser: Normaliser = option("softmax", choices=NORMALISERS, doc="What makes weights of scores.")
    sigmoid_shift: float | None = option(None, doc="Added to scores before the sigmoid; null for -log(T).")
    clip_low: float = option(0.0, minimum=-100.0, maximum=0.0, doc="Weight before clipping that a softmax of 0 has.")
    clip_high: float = option(1.0, minimum=1.0, maximum=100.0, doc="Weight before clipping that a softmax of 1 has.")
    gate: Literal["none", "head", "elementwise"] = option(
        "none",
        choices=("none", "head", "elementwise"),
        doc="Gate the heads by the input: by one number, or each channel.",
    )
    gate_bias: float | None = option(None, doc="Where a learned bias of the gate begins; null for none.")
    bias: bool = option(False, doc="Add learned biases to queries, keys, values and output.")
    causal: bool = context_option(True, doc="Hide later tokens.")
    position: str = context_option("none", doc="Position component.")

    def check(self, d_model: int) -> str | None:
        if self.head_dim is None and d_model % self.num_heads:
            return f"num_heads {self.num_heads} does not divide d_model {d_model}"
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            return f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}"
        if self.window == 1:
            return "with window 1 no token sees another; use the token mixer identity"
        if self.parameter_tokens and self.bias:
            return "parameter tokens have no biases; use bias: false"
        if self.conv_size == 1:
            return "a convolution over 1 token sees no other; use conv_size 0"
        if self.normaliser == "sigmoid" and self.causal and self.sigmoid_shift is None:
            return "a decoder's sigmoid_shift cannot depend on the length; give a number, such as -log of the length"
        return self._position().check(self._sizes(d_model)[2])

    def growth_exponent(self) -> float:
        return 1.0 if self.window else self.growth

    def build(self, b: Builder, x: Tensor) -> Tensor:
        q, k, v = self._place(b, self._project(b, x))
        return self._output(b, x, self._attend(b, (q, k, v), causal=self.causal, window=self.window or None))

    def build_with_weights(self, b: Builder, x: Tensor) -> tuple[Tensor, Tensor]:
        plain = self.normaliser == "softmax" and not (self.causal or self.window or self._position().slopes(1))
        if not plain or self.num_kv_heads not in (None, self.num_heads):
            raise GraphError(
                "weights for a reducer come from plain attention",
                where=self.key(),
                expected="no mask, window, alibi, groups or other normaliser",
                found=str(self.options()),
            )
        q, k, v = (b.transpose(heads, 0, 2, 1, 3) for heads in self._place(b, self._project(b, x)))
        weights = b.softmax(b.matmul(q, k, transpose_b=True) * q.shape[-1] ** -0.5)
        return self._output(b, x, b.transpose(b.matmul(weights, v), 0, 2, 1, 3)), weights

    def _attend(
        self,
        b: Builder,
        qkv: tuple[Tensor, Tensor, Tensor],
        *,
        causal: bool = False,
        window: int | None = None,
        offset: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        sigmoid, clipped = self.normaliser == "sigmoid", self.normaliser == "clipped_softmax"
        return b.attention(
            *qkv,
            causal=causal,
            window=window,
            alibi=self._position().slopes(self.num_heads),
            offset=offset,
            bias=bias,
            normaliser=self.normaliser,
            shift=self.sigmoid_shift if sigmoid else None,
            stretch=(self.clip_low, self.clip_high) if clipped else (0.0, 1.0),
        )

    def _position(self) -> Position:
        position = registry.get("position", self.position).create({})
        assert isinstance(position, Position)
        return position

    def _sizes(self, d_model: int) -> tuple[int, int, int]:
        """Heads, heads of keys and values, size of a head."""
        return self.num_heads, self.num_kv_heads or self.num_heads, self.head_dim or d_model // self.num_heads

    def _project(self, b: Builder, x: Tensor, recent: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, H, K]`, keys and values `[B, T, G, K]`; `recent` holds the convolutions' states."""
        heads, groups, head_dim = self._sizes(x.shape[-1])
        q = self._projection(b, x, "q", (Axis("heads", heads), Axis("head_dim", head_dim)), recent)
        k = self._projection(b, x, "k", (Axis("kv_heads", groups), Axis("head_dim", head_dim)), recent)
        v = self._projection(b, x, "v", (Axis("kv_heads", groups), Axis("head_dim", head_dim)), recent)
        return q, k, v

    def _projection(
        self, b: Builder, x: Tensor, name: str, axes: tuple[Axis, Axis], recent: dict[str, Tensor] | None
    ) -> Tensor:
        """Heads `[B, T, H, K]` of one kind, convolved; puts the new state of the convolution in place of the old."""
        if self.parameter_tokens:
            y = token_parameters.attend(b, x, name, self.parameter_tokens, axes)
        else:
            y = b.linear(x, name, axes, bias=self.bias)
        if self.conv_size:
            size, channels = self.conv_size, y.shape[-1]
            window = (taps(size, causal=self.causal),), (Axis("group", 1),), axes
            kernel = b.parameter(f"{name}_conv", window, f"taps(0.5, {0.5 / size:g})")  # as published
            after = 0 if self.causal else size // 2
            padding = ((size - 1 - after, after),)
            if recent is not None:
                y = b.concat(1, recent[f"{name}_recent"], y)
                recent[f"{name}_recent"] = b.slice(y, 1, y.shape[1] - size + 1, y.shape[1])
                padding = ((0, 0),)
            y = b.conv(y, kernel, padding=padding, groups=channels)
        return b.split_heads(y, axes[0].size)

    def _place(
        self, b: Builder, qkv: tuple[Tensor, Tensor, Tensor], at: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norm queries and keys and turn them by their position, which starts at a run-time one when streaming."""
        q, k, v = qkv
        if self.qk_norm:
            size = Axis("head_dim", q.shape[-1])
            q = b.rms_norm(q, b.parameter("q_norm", ((size,),), "constant(1)"))
            k = b.rms_norm(k, b.parameter("k_norm", ((size,),), "constant(1)"))
        position = self._position()
        return position.rotate(b, q, at), position.rotate(b, k, at), v

    def _output(self, b: Builder, x: Tensor, o: Tensor) -> Tensor:
        """Gate and merge o `[B, T, H, K]`, and map it to `[B, T, D]`."""
        batch, tokens, heads, head_dim = o.shape
        merged = (Axis("heads", heads), Axis("head_dim", head_dim))
        if self.gate != "none":
            axes = merged[:1] if self.gate == "head" else merged
            gate = b.linear(x, "gate", axes)
            if self.gate_bias is not None:
                gate = gate + b.parameter("gate_bias", (axes,), f"constant({self.gate_bias:g})")
            o = o * b.reshape(b.sigmoid(gate), batch, tokens, heads, -1)
        d_model = (Axis("d_model", x.shape[-1]),)
        if self.parameter_tokens:
            return token_parameters.attend(b, b.merge_heads(o), "out", self.parameter_tokens, d_model, inputs=merged)
        y = b.matmul(b.merge_heads(o), b.parameter("out", (merged, d_model)))
        return y + b.parameter("out_bias", (d_model,), "constant(0)") if self.bias else y

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        heads, groups, head_dim = self._sizes(d_model)
        slots = min(max_len, self.window - 1) if self.window else max_len
        cache = TensorType((batch, slots, groups, head_dim))
        state = {"k": cache, "v": cache}
        if self.conv_size:
            for name, count in (("q", heads), ("k", groups), ("v", groups)):
                state[f"{name}_recent"] = TensorType((batch, self.conv_size - 1, count * head_dim))
        return state

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        after = dict(state)
        q, k, v = self._place(b, self._project(b, x, after), position)
        if self.window and state["k"].shape[1] == self.window - 1:  # else the stream ends before the window is full
            return self._output(b, x, self._slide(b, (q, k, v), after, position)), after
        after["k"] = b.dynamic_update(state["k"], k, position, axis=1)
        after["v"] = b.dynamic_update(state["v"], v, position, axis=1)
        o = self._attend(b, (q, after["k"], after["v"]), causal=True, offset=position)
        return self._output(b, x, o), after

    def _slide(
        self, b: Builder, qkv: tuple[Tensor, Tensor, Tensor], after: dict[str, Tensor], position: Tensor
    ) -> Tensor:
        """Attend the last `window` tokens, of which the state holds all but the newest; renews the state."""
        q, k, v = qkv
        keys, values = b.concat(1, after["k"], k), b.concat(1, after["v"], v)
        age = b.constant(np.expand_dims(np.arange(self.window - 1, -1, -1), (0, 1, 2)))
        bias = b.where(b.less_equal(age, position), b.constant(0.0), _HIDDEN)
        after.update(k=b.slice(keys, 1, 1, self.window), v=b.slice(values, 1, 1, self.window))
        return self._attend(b, (q, keys, values), bias=bias)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        heads, groups, head_dim = self._sizes(x.shape[-1])
        q, k, v = (self._projected(params, name, x) for name in ("q", "k", "v"))
        q, k, v = (reference.split_heads(y, count) for y, count in ((q, heads), (k, groups), (v, groups)))
        if self.qk_norm:
            q, k = reference.rms_norm(q) * params["q_norm"], reference.rms_norm(k) * params["k_norm"]
        if self.position == "rope":
            q, k = reference.rotate(q), reference.rotate(k)
        slopes = self._position().slopes(heads) or (0.0,) * heads
        o = np.zeros_like(q)
        for t in range(x.shape[1]):
            seen = [s for s in range(x.shape[1]) if self._sees(t, s)]
            for h in range(heads):
                group = h // (heads // groups)
                distance = np.abs(t - np.array(seen))
                scores = np.einsum("bk,bsk->bs", q[:, t, h], k[:, seen, group]) / head_dim**0.5 - slopes[h] * distance
                o[:, t, h] = np.einsum("bs,bsk->bk", self._weights(scores, x.shape[1]), v[:, seen, group])
        if self.gate != "none":
            gate = reference.sigmoid(x @ params["gate"] + params.get("gate_bias", 0.0))
            o = o * np.reshape(gate, (*o.shape[:3], -1))
        if self.parameter_tokens:
            return token_parameters.attend_reference(params, "out", reference.merge_heads(o))
        return reference.merge_heads(o) @ params["out"] + params.get("out_bias", 0.0)

    def _projected(self, params: Mapping[str, Array], name: str, x: Array) -> Array:
        if self.parameter_tokens:
            y = token_parameters.attend_reference(params, name, x)
        else:
            y = x @ params[name] + params.get(f"{name}_bias", 0.0)
        if not self.conv_size:
            return y
        before = self.conv_size - 1 if self.causal else (self.conv_size - 1) // 2
        convolved = np.zeros_like(y)
        for t in range(y.shape[1]):
            for w in range(self.conv_size):
                if 0 <= t + w - before < y.shape[1]:
                    convolved[:, t] += params[f"{name}_conv"][w, 0] * y[:, t + w - before]
        return convolved

    def _weights(self, scores: Array, tokens: int) -> Array:
        """Weights of the seen keys out of their scores."""
        if self.normaliser == "sigmoid":
            return reference.sigmoid(scores + (-np.log(tokens) if self.sigmoid_shift is None else self.sigmoid_shift))
        weights = reference.softmax(scores)
        if self.normaliser == "softmax":
            return weights
        return np.minimum(np.maximum((self.clip_high - self.clip_low) * weights + self.clip_low, 0.0), 1.0)

    def _sees(self, t: int, s: int) -> bool:
        return not (self.causal and s > t) and not (self.window and abs(t - s) >= self.window)
