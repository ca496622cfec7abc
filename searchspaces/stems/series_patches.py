"""Series patches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.types import Axis
from searchspaces.parts import EndCase, Stem
from searchspaces.signature import Signature


def _window(seq_len: int, variates: int) -> Signature:
    return Signature(modality="series", output="forecast", seq_len=seq_len, variates=variates, horizon=3)


class SeriesPatches(Stem):
    """Stretches of a series, each mapped to a token by one matrix (Nie et al. 2023), all variates together.

    `series` `[B, L, C]` -> `[B, (L - P) // S + 1, D]` for length P and stride S; the last patch ends with the series,
    and the oldest values that fill no patch are left out. (P C + 1) D parameters. P = 1 embeds each time by itself.
    """

    paper = (
        "Nie et al. 2023, A Time Series is Worth 64 Words: Long-term Forecasting with Transformers, arXiv 2211.14730"
    )
    modality = "series"
    cases = (
        EndCase(signature=_window(11, 3)),
        EndCase({"patch_size": 1}, signature=_window(7, 2)),
        EndCase({"patch_size": 5, "stride": 2}, batch=1, d_model=5, signature=_window(12, 1)),
    )

    patch_size: int = option(4, minimum=1, maximum=4096, doc="Times in a patch.")
    stride: int | None = option(None, minimum=1, doc="Times from one patch to the next; null for the patch size.")

    def check(self, signature: Signature) -> str | None:
        if signature.modality == self.modality and signature.seq_len < self.patch_size:
            return f"patch_size {self.patch_size} is longer than the series of {signature.seq_len}"
        return super().check(signature)

    def num_tokens(self, signature: Signature) -> int:
        return (signature.seq_len - self.patch_size) // (self.stride or self.patch_size) + 1

    def build(self, b: Builder, x: Tensor, d_model: int, signature: Signature) -> Tensor:
        batch, length, variates = x.shape
        patch, stride = self.patch_size, self.stride or self.patch_size
        tokens = (length - patch) // stride + 1
        used = (tokens - 1) * stride + patch
        x = x if used == length else b.slice(x, 1, length - used, length)
        inputs = (Axis("patch", patch), Axis("variates", variates))
        weight = b.parameter("weight", (inputs, (Axis("d_model", d_model),)))
        bias = b.parameter("bias", ((Axis("d_model", d_model),),), "constant(0)")
        if stride == patch:
            return b.matmul(b.reshape(x, batch, tokens, patch * variates), weight) + bias
        return b.conv(x, b.reshape(weight, patch, variates, d_model), strides=(stride,)) + bias

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        stops = range(x.shape[1], self.patch_size - 1, -(self.stride or self.patch_size))
        patches = [x[:, stop - self.patch_size : stop] for stop in reversed(stops)]
        tokens = [np.reshape(patch, (x.shape[0], -1)) @ params["weight"] + params["bias"] for patch in patches]
        return np.stack(tokens, axis=1)
