"""Layer norm."""

from __future__ import annotations

from collections.abc import Mapping

from ir.builder import Builder, Tensor
from ir.component import Case, Norm
from ir.op import Array
from ir.types import Axis
from searchspaces import reference


class LayerNorm(Norm):
    """Layer norm (Ba, Kiros and Hinton 2016).

    y = (x - mean(x)) / sqrt(var(x) + 1e-5) * scale + bias over the D channels of each token; 2 D parameters.
    """

    paper = "Ba, Kiros, Hinton 2016, Layer Normalization, arXiv 1607.06450"
    cases = (Case(), Case(batch=1, time=3, d_model=5))

    def build(self, b: Builder, x: Tensor) -> Tensor:
        axes = ((Axis("d_model", x.shape[-1]),),)
        return b.layer_norm(x, b.parameter("scale", axes, "constant(1)"), b.parameter("bias", axes, "constant(0)"))

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return reference.layer_norm(x) * params["scale"] + params["bias"]
