"""Root-mean-square norm."""

from __future__ import annotations

from collections.abc import Mapping

from ir.builder import Builder, Tensor
from ir.component import Case, Norm
from ir.op import Array
from ir.types import Axis
from searchspaces import reference


class RmsNorm(Norm):
    """Root-mean-square norm (Zhang and Sennrich 2019).

    y = x / sqrt(mean(x^2) + 1e-5) * scale over the D channels of each token; D parameters.
    """

    paper = "Zhang, Sennrich 2019, Root Mean Square Layer Normalization, arXiv 1910.07467"
    cases = (Case(), Case(batch=1, time=3, d_model=5))

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return b.rms_norm(x, b.parameter("scale", ((Axis("d_model", x.shape[-1]),),), "constant(1)"))

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return reference.rms_norm(x) * params["scale"]
