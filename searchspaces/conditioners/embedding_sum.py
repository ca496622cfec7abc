"""Sum of the embeddings of a time and a label."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ir.builder import Builder, Tensor
from ir.component import option
from ir.op import Array
from ir.ops.elementwise import Cos, Sin
from ir.types import Axis
from searchspaces import reference
from searchspaces.parts import Conditioner, EndCase
from searchspaces.signature import Condition, Signature

_MAX_PERIOD = 10000.0  # of the slowest wave, over 2 pi (Ho et al. 2020, and Vaswani et al. 2017 before)


def _noisy(condition: Condition) -> Signature:
    return Signature(modality="image", output="denoise", image_size=4, channels=1, out_channels=1, condition=condition)


class EmbeddingSum(Conditioner):
    """Embeddings of the time and of the label, added up (Peebles and Xie 2023, DiT).

    c `[B, D]` = silu(cos(f t) W_cos + sin(f t) W_sin + b_1) W_2 + b_2 + table[label] with the frequencies f_i =
    10000^(-i/F) in float32, i < F. (2 F + 1) D + (D + 1) D parameters for the time, D for each label; what the task
    does not give is left out.
    """

    paper = "Peebles, Xie 2023, Scalable Diffusion Models with Transformers, arXiv 2212.09748"
    cases = (
        EndCase({"frequencies": 3}, signature=_noisy(Condition(timestep=True, num_labels=11))),
        EndCase({"frequencies": 1}, d_model=5, signature=_noisy(Condition(timestep=True))),
        EndCase(d_model=5, signature=_noisy(Condition(num_labels=11))),
    )

    frequencies: int = option(128, minimum=1, maximum=65_536, doc="Waves that tell the time, a cosine and a sine each.")

    def build(self, b: Builder, inputs: Mapping[str, Tensor], d_model: int, condition: Condition) -> Tensor:
        width, parts = Axis("d_model", d_model), list[Tensor]()
        if "timestep" in inputs:
            hidden = Axis("hidden", d_model)
            waves = ((Axis("frequencies", self.frequencies),), (hidden,))
            angles = b.reshape(inputs["timestep"], -1, 1) * b.constant(self._frequencies())
            time = b.matmul(b.apply(Cos(), angles), b.parameter("time_cos", waves, "normal(0.02)"))
            time = time + b.matmul(b.apply(Sin(), angles), b.parameter("time_sin", waves, "normal(0.02)"))
            time = b.silu(time + b.parameter("time_bias", ((hidden,),), "constant(0)"))
            time = b.matmul(time, b.parameter("time_out", ((hidden,), (width,)), "normal(0.02)"))
            parts.append(time + b.parameter("time_out_bias", ((width,),), "constant(0)"))
        if "label" in inputs:
            labels = (Axis("labels", condition.num_labels),)
            parts.append(b.take(b.parameter("table", (labels, (width,)), "normal(0.02)"), inputs["label"]))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _frequencies(self) -> Array:
        return _MAX_PERIOD ** (-np.arange(self.frequencies) / self.frequencies)

    def reference(self, params: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
        rows: list[Array] = []
        for example in range(len(next(iter(inputs.values())))):
            c: Array = np.zeros(())
            if "timestep" in inputs:
                time = float(inputs["timestep"][example])
                rates = [float(np.float32(_MAX_PERIOD ** (-i / self.frequencies))) for i in range(self.frequencies)]
                h = params["time_bias"]
                for i, rate in enumerate(rates):
                    h = h + np.cos(time * rate) * params["time_cos"][i] + np.sin(time * rate) * params["time_sin"][i]
                h = reference.silu(h)
                c = c + h @ params["time_out"] + params["time_out_bias"]
            if "label" in inputs:
                c = c + params["table"][inputs["label"][example]]
            rows.append(c)
        return np.stack(rows)
