"""Norms and gates that a condition sets."""

from __future__ import annotations

import numpy as np

from ir.builder import Tensor
from ir.component import Case
from ir.op import Array
from ir.types import Axis
from searchspaces import reference
from searchspaces.parts import Block, LayerParts, X

_EPSILON = 1e-6  # of the published model


class AdaLnZero(Block):
    """Shift, scale and gate of each branch from the condition, all of them 0 at first (Peebles and Xie 2023, DiT).

    (a_1, s_1, g_1, a_2, s_2, g_2) = silu(c) W + bias for a condition c `[B, C]`, six vectors `[B, D]`;
    y = x + g_1 * mix(norm(x) * (1 + s_1) + a_1), z = y + g_2 * channel(norm(y) * (1 + s_2) + a_2), with norm the layer
    norm without parameters, whatever the norm of the model. W and bias start at 0, so that a layer starts as the
    identity. 6 (C + 1) D parameters, half of them without a channel mixer.
    """

    paper = "Peebles, Xie 2023, Scalable Diffusion Models with Transformers, arXiv 2212.09748, section 3.2"
    conditioned = True
    cases = (Case(), Case(batch=1, time=3, d_model=5), Case(d_model=6, grid=(2, 3)))

    def build(self, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        assert layer.condition is not None
        b, branches = x.builder, [layer.mix] if layer.channel is None else [layer.mix, layer.channel]
        weight, bias = self._parameters(layer.condition.shape[-1], x.shape[-1], layer)
        vectors = b.matmul(b.silu(layer.condition), weight) + bias
        wide = (x.shape[0], *[1] * (x.type.rank - 2), x.shape[-1])
        parts = (b.reshape(part, *wide) for part in b.split(vectors, -1, *[wide[-1]] * (3 * len(branches))))
        for branch in branches:
            shift, scale, gate = next(parts), next(parts), next(parts)
            x = x + gate * branch(b.layer_norm(x, epsilon=_EPSILON) * (1.0 + scale) + shift)
        return x

    def _parameters(self, inputs: int, size: int, layer: LayerParts[X]) -> tuple[X, X]:
        """Weight and bias of what the condition sets."""
        outputs = (Axis("parts", 3 if layer.channel is None else 6), Axis("d_model", size))
        weight = layer.parameter("modulation", ((Axis("d_model", inputs),), outputs), "constant(0)")
        return weight, layer.parameter("modulation_bias", (outputs,), "constant(0)")

    def reference(self, x: Array, layer: LayerParts[Array]) -> Array:
        assert layer.condition is not None
        weight, bias = self._parameters(layer.condition.shape[-1], x.shape[-1], layer)
        y = np.empty_like(x)
        for example, c in enumerate(layer.condition):
            parts = np.reshape(reference.silu(c) @ weight + bias, (-1, x.shape[-1]))
            one = x[example : example + 1]
            one = one + parts[2] * layer.mix(reference.layer_norm(one, _EPSILON) * (1 + parts[1]) + parts[0])
            if layer.channel is not None:
                one = one + parts[5] * layer.channel(reference.layer_norm(one, _EPSILON) * (1 + parts[4]) + parts[3])
            y[example] = one[0]
        return y
