"""A stack of layers that runs several times on its own output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ir.builder import Builder, Tensor
from ir.component import option
from ir.errors import InputError
from searchspaces.macros.staged import Assembly, NumberedLayer, Place, Staged, Stream

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
        x = super().run_layers(assembly, x, layers[: self.pre], place)
        with assembly.b.reuse():
            if place.stream is None:
                x = self._loop(assembly, x, layers[self.pre : stop], place)
            else:
                x = self._stream(assembly, x, layers[self.pre : stop], place, place.stream)
        return super().run_layers(assembly, x, layers[stop:], place)

    def _loop(self, assembly: Assembly, x: Tensor, body: Sequence[NumberedLayer], place: Place) -> Tensor:
        """All turns as one loop; the first stands before it where the others read another input."""

        def turn(b: Builder, carried: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            condition = given[-1] if side else None
            inside = dataclasses.replace(assembly, b=b, expanded=True, condition=condition)
            return (super(Looped, self).run_layers(inside, sum(given[: len(added)], carried[0]), body, place),)

        side = () if assembly.condition is None else (assembly.condition,)
        added, times = ((x,), self.times - 1) if self.inject else ((), self.times)
        if self.inject or times == 1:
            x, times = super().run_layers(assembly, x, body, place), self.times - 1
        return assembly.b.loop(times, turn, (x,), (*added, *side))[0] if times else x

    def _stream(
        self, assembly: Assembly, x: Tensor, body: Sequence[NumberedLayer], place: Place, stream: Stream
    ) -> Tensor:
        """The turns one after the other, each with states of its own."""
        first = x
        for turn in range(self.times):
            after = Place(place.grid, dataclasses.replace(stream, turn=turn))
            x = super().run_layers(assembly, x + first if self.inject and turn else x, body, after)
        return x
