"""Next-token logits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import EndCase, Head
from searchspaces.signature import Signature

_EMBEDDING = "stem.embedding"
_SIGNATURE = Signature(modality="tokens", output="next_token", seq_len=7, vocab_size=11)


class LanguageModel(Head):
    """Scores of the next token, by the embedding's own vectors if tied (Press and Wolf 2017).

    `[B, T, D]` -> `logits` `[B, T, vocabulary]`: x E^T tied, x W else; no parameters tied, D * vocabulary else.
    """

    paper = "Press, Wolf 2017, Using the Output Embedding to Improve Language Models, arXiv 1608.05859"
    output = "next_token"
    shared = (_EMBEDDING,)
    cases = (EndCase(signature=_SIGNATURE), EndCase({"tied": False}, batch=1, d_model=5, signature=_SIGNATURE))

    tied: bool = option(True, doc="Use the token embedding for the output too.")

    def build(self, b: Builder, x: Tensor, signature: Signature) -> Tensor:
        if self.tied:
            return b.matmul(x, b.shared(_EMBEDDING), transpose_b=True)
        return b.linear(x, "weight", (Axis("vocab", signature.vocab_size),), init="normal(0.02)")

    def reference(self, params: Mapping[str, Array], x: Array, signature: Signature) -> Array:
        vectors = params[_EMBEDDING] if self.tied else np.transpose(params["weight"])
        return np.stack([x @ vectors[token] for token in range(signature.vocab_size)], axis=-1)
