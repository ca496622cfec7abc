"""Attention of tokens to learned keys and values, which stands in for a matrix (Wang et al. 2024, TokenFormer).

With keys P `[n, D]` and values W `[n, O]`, s = x P^T, y = gelu(sqrt(n) s / |s|) W. More rows make a larger model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ir.builder import Builder, Tensor
from ir.op import Array
from ir.types import Axis
from searchspaces import reference

_EPSILON = 1e-12  # keeps a token without any score finite


def attend(
    b: Builder, x: Tensor, name: str, count: int, outputs: Sequence[Axis], *, inputs: Sequence[Axis] | None = None
) -> Tensor:
    """x `[..., D]` to `[..., O]` by `count` parameter tokens: `name_keys` `[n, D]` and `name_values` `[n, O]`."""
    tokens = (Axis("parameter_tokens", count),)
    keys = b.parameter(f"{name}_keys", (tokens, tuple(inputs or (Axis("d_model", x.shape[-1]),))), "normal(0.02)")
    values = b.parameter(f"{name}_values", (tokens, tuple(outputs)))
    scores = b.rms_norm(b.matmul(x, keys, transpose_b=True), epsilon=_EPSILON)  # of length sqrt(n)
    return b.matmul(b.gelu(scores), values)


def attend_reference(params: Mapping[str, Array], name: str, x: Array) -> Array:
    """The same in numpy."""
    scores = np.einsum("...d,nd->...n", x, params[f"{name}_keys"])
    length = np.sqrt(np.sum(scores**2, axis=-1, keepdims=True))
    return reference.gelu(np.sqrt(scores.shape[-1]) * scores / length) @ params[f"{name}_values"]


def doubled(params: Mapping[str, Array], *names: str) -> Mapping[str, Array]:
    """Each parameter token twice, with half its value: a larger model that computes the same."""
    grown = dict(params)
    for name in names:
        keys, values = params[f"{name}_keys"], params[f"{name}_values"]
        grown[f"{name}_keys"] = np.concatenate([keys, keys])
        grown[f"{name}_values"] = np.concatenate([values, values]) / 2.0
    return grown
