"""Batch norm."""

from __future__ import annotations

from collections.abc import Mapping

from ir.builder import Builder, Tensor
from ir.component import Case, Norm
from ir.op import Array
from searchspaces import reference


class BatchNorm(Norm):
    """Batch norm (Ioffe and Szegedy 2015): mean and variance of each channel over the batch and all tokens.

    y = (x - mean) / sqrt(var + 1e-5) * scale + bias; in training of the batch, else the running ones, so that tokens
    and examples stay apart. A product before it takes it up when the model is compiled. 2 D parameters, 2 D statistics.
    """

    paper = "Ioffe, Szegedy 2015, Batch Normalization, arXiv 1502.03167"
    cases = (Case(), Case(batch=1, time=3, d_model=5))

    def build(self, b: Builder, x: Tensor) -> Tensor:
        return b.batch_norm(x, "norm")

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return reference.batch_norm(params, "norm", x)
