"""Linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, State, TokenMixer, context_option, option
from ir.op import Array
from ir.ops.recurrence import FORMS, Form
from ir.types import Axis, TensorType
from searchspaces import reference

_EPSILON = 1e-6  # keeps the normaliser from zero, as in the authors' code


class LinearAttention(TokenMixer):
    """Linear attention (Katharopoulos et al. 2020): softmax's kernel replaced by phi(q) . phi(k).

    o_t = phi(q_t)^T sum_s phi(k_s) v_s^T / phi(q_t)^T sum_s phi(k_s), over s <= t if causal, in each of H heads of size
    K = D / H; y = concat_h(o) W_out. phi is elu(x) + 1, or relu(x), or the softmax over the K features (Shen et al.
    2021). With `normaliser: rms_norm` each head's numerator is normed by root mean square instead of divided, which
    keeps gradients bounded (Qin et al. 2022, NormAttention). 4 D^2 parameters. Linear in T. State: H K (K + 1).
    """

    paper = (
        "Katharopoulos et al. 2020, Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, "
        "arXiv 2006.16236; Shen et al. 2021, Efficient Attention, arXiv 1812.01243; "
        "Qin et al. 2022, The Devil in Linear Transformer, arXiv 2210.10340"
    )
    aliases: ClassVar[Aliases] = {"norm_attention": {"normaliser": "rms_norm"}}
    forms = FORMS
    cases = (
        Case({"num_heads": 3, "causal": True}),
        Case({"num_heads": 3, "causal": False}),
        Case({"num_heads": 2, "feature_map": "relu", "causal": True}, time=11),
        Case({"num_heads": 1, "feature_map": "softmax", "causal": True}, batch=1, time=3, d_model=5),
        Case({"num_heads": 2, "feature_map": "softmax", "causal": False}, d_model=6),
        Case({"num_heads": 3, "normaliser": "rms_norm", "causal": True}),
        Case({"num_heads": 2, "normaliser": "rms_norm", "causal": False}, batch=1, d_model=6),
    )

    num_heads: int = option(4, minimum=1, maximum=1024, doc="Heads.")
    feature_map: Literal["elu", "relu", "softmax"] = option(
        "elu", choices=("elu", "relu", "softmax"), doc="phi: elu(x) + 1, relu(x), or softmax over the features."
    )
    normaliser: Literal["sum", "rms_norm"] = option(
        "sum", choices=("sum", "rms_norm"), doc="Divide by the sum of weights, or norm each head."
    )
    form: Form = option("auto", choices=FORMS, doc="How the causal recurrence is computed.")
    causal: bool = context_option(True, doc="Sum over earlier tokens only.")

    def check(self, d_model: int) -> str | None:
        return f"num_heads {self.num_heads} does not divide d_model {d_model}" if d_model % self.num_heads else None

    def build(self, b: Builder, x: Tensor) -> Tensor:
        q, k, v = self._project(b, x)
        if self.causal:
            o, _ = b.outer_scan(q, k, v, form=self.form)
            return self._output(b, q, o, b.cumsum(k, 1))
        q_BHTK, k_BHTK, v_BHTV = (b.transpose(t, 0, 2, 1, 3) for t in (q, k, v))
        memory_BHKV = b.matmul(k_BHTK, v_BHTV, transpose_a=True)
        o = b.transpose(b.matmul(q_BHTK, memory_BHKV), 0, 2, 1, 3)
        return self._output(b, q, o, b.sum(k, 1, keepdims=True))

    def _project(self, b: Builder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q), phi(k) and v, each `[B, T, H, K]`."""
        axes = (Axis("heads", self.num_heads), Axis("head_dim", x.shape[-1] // self.num_heads))
        q, k, v = (b.split_heads(b.linear(x, name, axes), self.num_heads) for name in ("q", "k", "v"))
        return self._features(b, q), self._features(b, k), v

    def _features(self, b: Builder, x: Tensor) -> Tensor:
        match self.feature_map:
            case "elu":
                return b.exp(b.minimum(x, 0.0)) + b.relu(x)
            case "relu":
                return b.relu(x)
            case "softmax":
                return b.softmax(x)

    def _output(self, b: Builder, q: Tensor, o: Tensor, z: Tensor) -> Tensor:
        """Normalise o, by q . z for one, and map it to `[B, T, D]`."""
        heads, head_dim = o.shape[2:]
        o = b.rms_norm(o) if self.normaliser == "rms_norm" else o / (b.sum(q * z, -1, keepdims=True) + _EPSILON)
        merged = (Axis("heads", heads), Axis("head_dim", head_dim))
        return b.matmul(b.merge_heads(o), b.parameter("out", (merged, (Axis("d_model", heads * head_dim),))))

    def state(self, batch: int, d_model: int, max_len: int) -> State:
        head_dim = d_model // self.num_heads
        return {
            "memory": TensorType((batch, self.num_heads, head_dim, head_dim)),
            "total": TensorType((batch, 1, self.num_heads, head_dim)),
        }

    def step(
        self, b: Builder, x: Tensor, state: Mapping[str, Tensor], position: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self._project(b, x)
        o, last = b.outer_scan(q, k, v, state=state["memory"], form=self.form)
        count = x.shape[1]
        total = state["total"] + (k if count == 1 else b.cumsum(k, 1))
        newest = total if count == 1 else b.slice(total, 1, count - 1, count)
        return self._output(b, q, o, total), {"memory": last, "total": newest}

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        phi = {"elu": _elu_plus_one, "relu": _relu, "softmax": reference.softmax}[self.feature_map]
        q, k, v = (reference.split_heads(x @ params[name], self.num_heads) for name in ("q", "k", "v"))
        q, k, o = phi(q), phi(k), np.zeros_like(v)
        for t in range(x.shape[1]):
            seen = t + 1 if self.causal else x.shape[1]
            weights = np.einsum("bhk,bshk->bsh", q[:, t], k[:, :seen])
            o[:, t] = np.einsum("bsh,bshv->bhv", weights, v[:, :seen])
            if self.normaliser == "sum":
                o[:, t] /= weights.sum(axis=1)[..., None] + _EPSILON
        o = reference.rms_norm(o) if self.normaliser == "rms_norm" else o
        return reference.merge_heads(o) @ params["out"]


def _relu(x: Array) -> Array:
    return np.where(x > 0, x, 0.0)


def _elu_plus_one(x: Array) -> Array:
    return np.where(x > 0, x, np.expm1(x)) + 1.0
