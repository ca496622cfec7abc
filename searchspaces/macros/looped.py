"""A stack of layers that runs several times on its own output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ir.builder import Tensor
from ir.component import option
from ir.errors import InputError
from searchspaces.macros.staged import Assembly, NumberedLayer, Place, Staged

if TYPE_CHECKING:
    from searchspaces.architecture import ModelConfig
    from searchspaces.signature import Signature


class Looped(Staged):
    """Looped transformer between two plain ones (Gao et al. 2024, AlgoFormer): post(loop^T(pre(x))).

    The first `pre` layers and the last `post` ones run once, those between them, with one set of weights, T = `times`
    times. With `inject` each turn but the first reads its output plus the first one's input (Yang et al. 2023). T
    changes no parameter, and T = 1 is the plain stack. A step graph has states for each turn: `.turn1` and so on.
    """

    paper = (
        "Gao et al. 2024, On the Expressive Power of a Variant of the Looped Transformer, arXiv 2402.13572; "
        "Yang et al. 2023, Looped Transformers are Better at Learning Learning Algorithms, arXiv 2311.12424"
    )

    pre: int = option(1, minimum=0, maximum=256, doc="Layers before the loop.")
    post: int = option(1, minimum=0, maximum=256, doc="Layers after the loop.")
    times: int = option(4, minimum=1, maximum=1024, doc="Turns of the loop.")
    inject: bool = option(False, doc="Add the loop's input to that of every later turn.")

    def require_fit(self, model: ModelConfig, signature: Signature) -> None:
        least = self.pre + self.post + 1
        if len(model.stages) != 1 or model.depth < least:
            raise InputError(
                "the macro looped cannot build this model",
                where="macro",
                expected=f"one stage of {least} layers or more: {self.pre} before, {self.post} after, 1 in the loop",
                found=f"{len(model.stages)} stages of {model.depth} layers",
            )

    def run_layers(self, assembly: Assembly, x: Tensor, layers: Sequence[NumberedLayer], place: Place) -> Tensor:
        stop = len(layers) - self.post
        body, after = layers[self.pre : stop], place
        x = super().run_layers(assembly, x, layers[: self.pre], place)
        first = x
        for turn in range(self.times):
            if place.stream is not None:
                after = Place(place.grid, dataclasses.replace(place.stream, turn=turn))
            with assembly.b.reuse():
                x = super().run_layers(assembly, x + first if self.inject and turn else x, body, after)
        return super().run_layers(assembly, x, layers[stop:], place)
