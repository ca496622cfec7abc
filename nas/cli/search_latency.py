"""`nas search --latency`: where latency comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ir.errors import InputError

if TYPE_CHECKING:
    from nas.objectives.base import Objective
    from searchspaces.space import Space


def predict_latency(
    given: str, space: Space, objectives: list[Objective], constraints: list[Objective], batch: int
) -> tuple[list[Objective], list[Objective]]:
    """Return objectives and constraints, with those of the space on latency, with latency and energy predicted.

    Args:
        given: Value of `--latency`, other than `measured`.
        space: Search space.
        objectives: Objectives of the command.
        constraints: Constraints of the command.
        batch: Sequences in one call, 1 where nothing was said.

    Raises:
        InputError: The option is malformed, its profile is missing, damaged or of another batch, or nobody asks
            for latency.
    """
    from nas.objectives.latency import Latency
    from nas.objectives.predicted_energy import PredictedEnergy
    from nas.objectives.predicted_latency import PredictedLatency, predict_instead
    from nas.search import space_constraints

    kind, _, name = given.partition(":")
    if kind != "predicted" or not name:
        expected = "measured, or predicted:PROFILE with a name or path of `nas profile`"
        raise InputError("bad source of latency", where="--latency", expected=expected, found=given)
    predicted = PredictedLatency.of(*name.split(","))
    if batch not in (1, predicted.profile.batch):
        expected = f"--batch {predicted.profile.batch}"
        raise InputError("the profile is of another batch", where="--latency", expected=expected, found=str(batch))
    demanded = [*constraints, *(item for item in space_constraints(space) if isinstance(item, Latency))]
    judged = predict_instead(predicted, objectives), predict_instead(predicted, demanded)
    if not any(isinstance(item, PredictedLatency | PredictedEnergy) for items in judged for item in items):
        expected = "latency or energy among the objectives or constraints"
        raise InputError("there is no latency to predict", where="--latency", expected=expected, found=given)
    return judged
