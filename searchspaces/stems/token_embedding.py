"""Token embedding."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import EndCase, Stem
from searchspaces.signature import Signature


class TokenEmbedding(Stem):
    """A learned vector for each token of the vocabulary (Bengio et al. 2003).

    `tokens` int32 `[B, T]` -> `[B, T, D]`; vocabulary * D parameters.
    """

    paper = "Bengio et al. 2003, A Neural Probabilistic Language Model, JMLR 3"
    modality = "tokens"
    cases = (EndCase(signature=Signature(modality="tokens", output="next_token", seq_len=7, vocab_size=11)),)

    def num_tokens(self, signature: Signature) -> int:
        return signature.seq_len

    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        axes = ((Axis("vocab", signature.vocab_size),), (Axis("d_model", d_model),))
        return b.take(b.parameter("embedding", axes, "normal(0.02)"), x)

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        return np.stack([[params["embedding"][token] for token in sequence] for sequence in x])
