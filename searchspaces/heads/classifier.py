"""Class logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces import reference
from searchspaces.parts import EndCase, Head
from searchspaces.signature import Signature

_SIGNATURE = Signature(modality="image", output="class", image_size=6, channels=3, num_classes=5)
Pool = Literal["mean", "first"]


class Classifier(Head):
    """Scores of the classes from one vector: the mean of all tokens (Lin, Chen and Yan 2014), or the first token.

    `[B, T, D]` -> `logits` `[B, classes]`: pool_t(x_t) W + bias; (D + 1) * classes parameters. With `norm` the pooled
    vector is normed first, as in ConvNeXt. With `projection` P, as in EfficientNet and RMT, each token first becomes
    silu(batch_norm(x_t W_p + b_p)) of P channels.
    """

    paper = "Lin, Chen, Yan 2014, Network In Network, arXiv 1312.4400, section 3.2 (global average pooling)"
    output = "class"
    cases = (
        EndCase(signature=_SIGNATURE),
        EndCase(batch=1, time=1, d_model=5, signature=_SIGNATURE),
        EndCase({"pool": "first", "norm": "layer_norm"}, signature=_SIGNATURE),
        EndCase({"norm": "batch_norm"}, signature=_SIGNATURE),
        EndCase({"projection": 5}, signature=_SIGNATURE),
    )

    pool: Pool = option("mean", choices=("mean", "first"), doc="What becomes of the tokens.")
    norm: Literal["none", "layer_norm", "batch_norm"] = option(
        "none", choices=("none", "layer_norm", "batch_norm"), doc="Norm of the pooled vector."
    )
    projection: int = option(0, minimum=0, doc="Channels that each token is mapped to before pooling; 0 for none.")

    def build(self, b: Builder, x: Tensor, signature: Signature) -> Tensor:
        if self.projection:
            x = b.linear(x, "projection", (Axis("hidden", self.projection),), bias=True)
            x = b.silu(b.batch_norm(x, "projection_norm"))
        batch, _, d_model = x.shape
        pooled = b.mean(x, 1) if self.pool == "mean" else b.reshape(b.slice(x, 1, 0, 1), batch, d_model)
        if self.norm == "layer_norm":
            axes = ((Axis("d_model", d_model),),)
            scale, bias = b.parameter("norm_scale", axes, "constant(1)"), b.parameter("norm_bias", axes, "constant(0)")
            pooled = b.layer_norm(pooled, scale, bias)
        elif self.norm == "batch_norm":
            pooled = b.batch_norm(pooled, "norm")
        return b.linear(pooled, "weight", (Axis("classes", signature.num_classes),), bias=True)

    def reference(self, params: Mapping[str, Array], x: Array, signature: Signature) -> Array:
        if self.projection:
            x = x @ params["projection"] + params["projection_bias"]
            x = reference.silu(reference.batch_norm(params, "projection_norm", x))
        pooled = sum(x[:, t] for t in range(x.shape[1])) / x.shape[1] if self.pool == "mean" else x[:, 0]
        if self.norm == "layer_norm":
            pooled = reference.layer_norm(pooled) * params["norm_scale"] + params["norm_bias"]
        elif self.norm == "batch_norm":
            pooled = reference.batch_norm(params, "norm", pooled)
        return pooled @ params["weight"] + params["weight_bias"]
