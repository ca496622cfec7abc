"""Two-layer perceptron with a depthwise convolution inside."""

from __future__ import annotations

from collections.abc import Mapping

from ir.builder import Builder, Tensor
from ir.component import Case, ChannelMixer, Limit, option
from ir.op import Array
from ir.types import Axis
from searchspaces import convolutions, reference
from searchspaces.parts import ACTIVATIONS, Activation


def _without_kernel(params: Mapping[str, Array]) -> Mapping[str, Array]:
    """The matrices and their biases alone."""
    return {name: array for name, array in params.items() if not name.startswith("kernel")}


class DepthwiseMlp(ChannelMixer):
    """A perceptron whose hidden channels are convolved over the image (Wang et al. 2022, PVT v2; Pan et al. 2022).

    y = act(conv(x W_up)) W_down, each of the F = round(expansion * D) hidden channels under its own window of K x K
    pixels; with `activation_first` conv(act(x W_up)), and with `residual`, as in RMT, what the convolution reads is
    added to what it gives. 2 D F + K^2 F parameters and biases.
    """

    paper = (
        "Wang et al. 2022, PVT v2, arXiv 2106.13797; Pan et al. 2022, Fast Vision Transformers with HiLo Attention, "
        "arXiv 2205.13213; Fan et al. 2023, RMT: Retentive Networks Meet Vision Transformers, arXiv 2309.11523"
    )
    spatial = True
    cases = (
        Case(grid=(4, 5), d_model=6),
        Case({"activation_first": True, "residual": True, "expansion": 1.5}, grid=(3, 4), d_model=5, batch=1),
        Case({"kernel_size": 5, "activation": "relu", "residual": True}, grid=(3, 3), d_model=4),
    )
    limits = (
        Limit(
            "with a kernel of zeros beside the residual it is the perceptron",
            Case({"residual": True}, grid=(4, 3), d_model=6),
            "mlp",
            {"bias": True},
            values={"kernel": 0.0, "kernel_bias": 0.0},
            adapt=_without_kernel,
        ),
    )

    expansion: float = option(4.0, minimum=0.1, maximum=64.0, doc="Hidden width over model width.")
    kernel_size: int = option(3, minimum=1, maximum=31, doc="Height and width of the window, pixels.")
    activation: Activation = option("gelu", choices=tuple(ACTIVATIONS), doc="Function of the hidden channels.")
    activation_first: bool = option(False, doc="Put the function before the convolution.")
    residual: bool = option(False, doc="Add the convolution's input to its output.")

    def build(self, b: Builder, x: Tensor) -> Tensor:
        d_model = Axis("d_model", x.shape[-1])
        hidden = Axis("hidden", max(1, round(self.expansion * d_model.size)))
        act = ACTIVATIONS[self.activation]
        h = b.linear(x, "up", (hidden,), bias=True)
        h = act(b, h) if self.activation_first else h
        c = convolutions.depthwise(b, h, "kernel", self.kernel_size)
        h = h + c if self.residual else c
        h = h if self.activation_first else act(b, h)
        return b.matmul(h, b.parameter("down", ((hidden,), (d_model,)))) + b.parameter(
            "down_bias", ((d_model,),), "constant(0)"
        )

    def reference(self, params: Mapping[str, Array], x: Array) -> Array:
        act = reference.ACTIVATIONS[self.activation]
        h = x @ params["up"] + params["up_bias"]
        h = act(h) if self.activation_first else h
        c = reference.convolve(h, params["kernel"], groups=h.shape[-1]) + params["kernel_bias"]
        h = h + c if self.residual else c
        h = h if self.activation_first else act(h)
        return h @ params["down"] + params["down_bias"]
