"""Recent measurements of a study, for a new one to be held against."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from nas.trial import Rival

if TYPE_CHECKING:
    from nas.study import Study

_RECENT = 64


def recent_rivals(study: Study) -> dict[str, tuple[Rival, ...]]:
    """Return the latest measurements of each objective that wants them; those whose models were not kept are left out.

    Args:
        study: The study so far.

    Returns:
        At most 64 for each objective, the latest first.
    """
    names = [metric.name for metric in study.goals.metrics if metric.wants_rivals]
    return {name: tuple(islice(_measured(study, name), _RECENT)) for name in names}


def _measured(study: Study, name: str) -> Iterator[Rival]:
    for trial in reversed(study.trials):
        quantity = trial.quantities.get(name)
        if quantity is not None and quantity.interval is not None and "candidate" in quantity.details:
            yield Rival(trial.number, quantity.value, quantity.interval, str(quantity.details["candidate"]))
