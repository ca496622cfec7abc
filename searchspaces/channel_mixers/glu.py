"""Gated linear unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from ir.builder import Builder, Tensor
from ir.component import Aliases, Case, ChannelMixer, option
from ir.op import Array
from ir.types import Axis
from searchspaces import reference
from searchspaces.parts import ACTIVATIONS, Activation


class Glu(ChannelMixer):
    """Gated linear unit (Shazeer 2020): SwiGLU, GEGLU or ReGLU by activation.

    y = (act(x W_gate) * (x W_up)) W_down with hidden width F = expansion * D rounded up to a multiple;
    3 D F parameters, 6 D F FLOPs a token. Expansion 8/3 costs what an mlp of expansion 4 does.
    """

    paper = "Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202"
    aliases: ClassVar[Aliases] = {
        "swiglu": {"activation": "silu"},
        "geglu": {"activation": "gelu"},
        "reglu": {"activation": "relu"},
    }
    cases = (
        Case(),
        Case({"activation": "gelu", "expansion": 1.5, "multiple": 1}, batch=1, time=3, d_model=5),
        Case({"activation": "relu", "multiple": 7}),
    )

    expansion: float = option(2.667, minimum=0.1, maximum=64.0, doc="Hidden width over model width.")
    activation: Activation = option("silu", choices=tuple(ACTIVATIONS), doc="Function of the gate.")
    multiple: int = option(8, minimum=1, maximum=4096, doc="The hidden width is rounded up to a multiple of this.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        d_model = Axis("d_model", x.shape[-1])
        hidden = Axis("hidden", self.multiple * math.ceil(self.expansion * d_model.size / self.multiple))
        gate = ACTIVATIONS[self.activation](b, b.linear(x, "gate", (hidden,)))
        return b.matmul(gate * b.linear(x, "up", (hidden,)), b.parameter("down", ((hidden,), (d_model,))))

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        gate = reference.ACTIVATIONS[self.activation](x @ params["gate"])
        return (gate * (x @ params["up"])) @ params["down"]
