"""Gates in place of residual sums."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ir.builder import Tensor
from ir.component import Case, option
from ir.op import Array
from ir.types import Axis
from searchspaces import reference
from searchspaces.parts import Block, LayerParts, X

Gate = Literal["gru", "input", "output", "highway", "sigmoid_tanh"]
_GATES: tuple[Gate, ...] = ("gru", "input", "output", "highway", "sigmoid_tanh")
_MATRICES = {  # of the stream x and of the branch y
    "gru": (("ur", "uz", "uh"), ("wr", "wz", "wh")),
    "input": (("w",), ()),
    "output": (("w",), ()),
    "highway": (("w",), ()),
    "sigmoid_tanh": ((), ("w", "u")),
}


class GatedResidual(Block):
    """Norm at the start of each branch, and a gate where it joins the stream (Parisotto et al. 2019, GTrXL).

    y = g_mixer(x, relu(mix(norm_mixer(x)))); z = g_channel(y, relu(channel(norm_channel(y)))), with s the logistic
    function and a learned bias b `[D]` that begins at `gate_bias`, so that a layer begins near the identity:

    - gru: (1 - f) x + f h, f = s(y W_z + x U_z - b), h = tanh(y W_h + (r x) U_h), r = s(y W_r + x U_r)
    - input: s(x W) x + y
    - output: x + s(x W - b) y
    - highway: s(x W + b) x + (1 - s(x W + b)) y
    - sigmoid_tanh: x + s(y W - b) tanh(y U)

    6 D^2 parameters for each of the two gates with gru, 2 D^2 with sigmoid_tanh, D^2 with the others.
    """

    paper = "Parisotto et al. 2019, Stabilizing Transformers for Reinforcement Learning, arXiv 1910.06764"
    cases = (
        Case(),
        Case({"gate": "input"}, batch=1, time=3, d_model=5),
        Case({"gate": "output"}),
        Case({"gate": "highway", "gate_bias": 1.0}),
        Case({"gate": "sigmoid_tanh"}),
    )

    gate: Gate = option("gru", choices=_GATES, doc="How a branch joins the stream.")
    gate_bias: float = option(2.0, minimum=-100.0, maximum=100.0, doc="Where the bias of a gate begins; high is shut.")

    def build(self, x: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        relu = x.builder.relu
        y = self._join("mixer", x, relu(layer.mix(layer.norm("norm_mixer", x))), layer)
        if layer.channel is None:
            return y
        return self._join("channel", y, relu(layer.channel(layer.norm("norm_channel", y))), layer)

    def _parameters(self, branch: str, size: int, layer: LayerParts[X]) -> dict[str, X]:
        """The matrices of a gate and its bias, by the names in the equations."""
        axis = Axis("d_model", size)
        names = [name for group in _MATRICES[self.gate] for name in group]
        found = {name: layer.parameter(f"gate_{branch}_{name}", ((axis,), (axis,)), "fan_in") for name in names}
        if self.gate != "input":
            found["b"] = layer.parameter(f"gate_{branch}_b", ((axis,),), f"constant({self.gate_bias:g})")
        return found

    def _join(self, branch: str, x: Tensor, y: Tensor, layer: LayerParts[Tensor]) -> Tensor:
        b, p = x.builder, self._parameters(branch, x.shape[-1], layer)
        match self.gate:
            case "gru":
                reset = b.sigmoid(b.matmul(y, p["wr"]) + b.matmul(x, p["ur"]))
                fresh = b.sigmoid(b.matmul(y, p["wz"]) + b.matmul(x, p["uz"]) - p["b"])
                candidate = b.tanh(b.matmul(y, p["wh"]) + b.matmul(reset * x, p["uh"]))
                return x + fresh * (candidate - x)
            case "input":
                return b.sigmoid(b.matmul(x, p["w"])) * x + y
            case "output":
                return x + b.sigmoid(b.matmul(x, p["w"]) - p["b"]) * y
            case "highway":
                return y + b.sigmoid(b.matmul(x, p["w"]) + p["b"]) * (x - y)
            case "sigmoid_tanh":
                return x + b.sigmoid(b.matmul(y, p["w"]) - p["b"]) * b.tanh(b.matmul(y, p["u"]))

    def reference(self, x: Array, layer: LayerParts[Array]) -> Array:
        mixed = layer.mix(layer.norm("norm_mixer", x))
        y = self._gated("mixer", x, np.maximum(mixed, 0.0), layer)
        if layer.channel is None:
            return y
        mixed = layer.channel(layer.norm("norm_channel", y))
        return self._gated("channel", y, np.maximum(mixed, 0.0), layer)

    def _gated(self, branch: str, x: Array, y: Array, layer: LayerParts[Array]) -> Array:
        p, s = self._parameters(branch, x.shape[-1], layer), reference.sigmoid
        match self.gate:
            case "gru":
                r = s(y @ p["wr"] + x @ p["ur"])
                f = s(y @ p["wz"] + x @ p["uz"] - p["b"])
                h = np.tanh(y @ p["wh"] + (r * x) @ p["uh"])
                return (1.0 - f) * x + f * h
            case "input":
                return s(x @ p["w"]) * x + y
            case "output":
                return x + s(x @ p["w"] - p["b"]) * y
            case "highway":
                f = s(x @ p["w"] + p["b"])
                return f * x + (1.0 - f) * y
            case "sigmoid_tanh":
                return x + s(y @ p["w"] - p["b"]) * np.tanh(y @ p["u"])
