"""Class logits."""

from __future__ import annotations

from collections.abc import Mapping

from ir.builder import Builder, Tensor
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import EndCase, Head
from searchspaces.signature import Signature

_SIGNATURE = Signature(modality="image", output="class", image_size=6, channels=3, num_classes=5)


class Classifier(Head):
    """Scores of the classes from the mean of all tokens (Lin, Chen and Yan 2014).

    `[B, T, D]` -> `logits` `[B, classes]`: mean_t(x_t) W + bias; (D + 1) * classes parameters.
    """

    paper = "Lin, Chen, Yan 2014, Network In Network, arXiv 1312.4400, section 3.2 (global average pooling)"
    output = "class"
    cases = (EndCase(signature=_SIGNATURE), EndCase(batch=1, time=1, d_model=5, signature=_SIGNATURE))

    def build(self, b: Builder, x: Tensor, signature: Signature) -> Tensor:
        classes = Axis("classes", signature.num_classes)
        return b.linear(b.mean(x, 1), "weight", (classes,), bias=True)

    def reference(self, params: Mapping[str, Array], x: Array, signature: Signature) -> Array:
        return sum(x[:, t] for t in range(x.shape[1])) / x.shape[1] @ params["weight"] + params["weight_bias"]
