"""What a study found, as plain data: for the tables and JSON of the command line, and for the report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir.errors import ArtifactError, DataError, GraphError, SpaceError
from nas.front import Front
from nas.study import Study
from nas.trial import Quantity, Trial

_UNIT_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Yardstick:
    """What a quality is to be held against.

    Attributes:
        metric: Name of the task's metric.
        unit: Its unit.
        direction: `min` or `max`, which way is better.
        chance: What knowing nothing scores.
        baselines: What trivial models score, by name.
    """

    metric: str
    unit: str
    direction: str
    chance: float
    baselines: Mapping[str, float]

    def describe(self) -> dict[str, Any]:
        """Return the yardstick as JSON."""
        return vars(self) | {"baselines": dict(self.baselines)}

    def better_baselines(self, quality: float) -> list[str]:
        """Names of the trivial models that score better than a quality."""
        sign = 1.0 if self.direction == "max" else -1.0
        return [name for name, score in self.baselines.items() if sign * score > sign * quality]


def result_json(study: Study) -> dict[str, Any]:
    """Return the outcome of a search as the command line prints it."""
    counted, front = study.count(), study.front()
    return {
        "run": str(study.folder) if study.folder is not None else None,
        "front": [trial_json(study, trial) | {"status": front.status(trial)} for trial in front.nominal],
        **front.describe(),
        "trials": {state: counted[state] for state in ("finished", "failed", "infeasible")}
        | ({"stopped": counted["stopped"]} if counted["stopped"] else {}),
    }


def trial_json(study: Study, trial: Trial) -> dict[str, Any]:
    """Return one trial as JSON."""
    path = artifact_path(study, trial)
    return {
        "trial": trial.number,
        "values": trial.values,
        "units": trial.units,
        "source": trial.sources,
        "interval": {name: list(q.interval) for name, q in trial.quantities.items() if q.interval is not None},
        "remeasured": sorted(trial.remeasured),
        "hash": trial.hash,
        "artifact": str(path) if path is not None else None,
    }


def front_lines(front: Front) -> list[str]:
    """Say which trials are on the front for certain, and which may be, with what is in the way."""
    lines = [f"  certain: trial {', '.join(str(trial.number) for trial in front.certain)}"] if front.certain else []
    reasons: dict[str, list[str]] = {}
    for trial in front.possible:
        reasons.setdefault(front.unsettled[trial.number], []).append(str(trial.number))
    return lines + [f"  possible: trial {', '.join(numbers)} ({reason})" for reason, numbers in reasons.items()]


def noise_lines(study: Study) -> list[str]:
    """Say how many measurements of a study are noisy, nothing where none is."""
    measured = [q for trial in study.trials for q in trial.quantities.values() if "noisy" in q.details]
    noisy = sum(bool(quantity.details["noisy"]) for quantity in measured)
    if not noisy:
        return []
    return [f"  {noisy} of {len(measured)} measurements are noisy: the machine changed meanwhile; see `nas doctor`"]


def artifact_path(study: Study, trial: Trial) -> Path | None:
    """Return the path of a trial's artifact, None where none was shipped."""
    return study.folder / trial.artifact if study.folder is not None and trial.artifact is not None else None


def artifact_manifest(study: Study, trial: Trial) -> dict[str, Any] | None:
    """Return what a trial's artifact says of itself, None where there is none or it is damaged."""
    path = artifact_path(study, trial)
    if path is None:
        return None
    from codegen import container

    try:
        return container.open_file(path).manifest
    except ArtifactError:
        return None


def yardstick(study: Study) -> Yardstick | None:
    """Return chance and baselines of a study's task, None where it has no task or its data is not to be had."""
    task = study.evaluator.task
    if task is None:
        return None
    try:
        baselines = task.baselines()
    except DataError:
        return None
    return Yardstick(task.metric.name, task.metric.unit, task.direction, task.chance, baselines)


def quality_name(study: Study) -> str | None:
    """Return the name of the objective that trains, None where a study has none."""
    trained = ("trained", "supernet", "proxy")
    return next((metric.name for metric in study.goals.metrics if metric.source in trained), None)


def parameter_count(study: Study, trial: Trial) -> int | None:
    """Return the number of parameters of a trial's model, None where it is none."""
    if "params" in trial.values:
        return int(trial.values["params"])
    if study.evaluator.task is None or not hasattr(trial.architecture, "graph"):
        return None
    from ir.cost import profile

    try:
        return profile(study.evaluator.context(trial.architecture, trial.number).graph("params")).params
    except (GraphError, SpaceError):  # a trial that failed because it cannot be built
        return None


def value_names(study: Study) -> list[str]:
    """Return the columns of a table of values: objectives, then what is only bounded; parameters have their own."""
    names = [item.name for item in (*study.goals.objectives, *study.goals.metrics)]
    return [name for name in dict.fromkeys(names) if name != "params"]


def mixers(encoded: Mapping[str, Any]) -> str:
    """Name the token mixers of an encoded architecture: runs of equal ones counted, stages parted by bars."""
    stages = encoded.get("stages")
    if not stages:
        return ", ".join(f"{name}={value}" for name, value in encoded.items())
    return " | ".join(_stage_mixers(stage) for stage in stages)


def _stage_mixers(stage: Mapping[str, Any]) -> str:
    names = [next(iter(layer["token_mixer"])) for layer in stage["layers"]]
    runs = [(name, len(list(run))) for name, run in itertools.groupby(names)]
    return " + ".join(f"{count} {name}" if count > 1 else name for name, count in runs) or "no layers"


def component_text(component: Mapping[str, Mapping[str, Any]] | None) -> str:
    """Write an encoded component with its options, as `mamba(state_dim=8)`."""
    if not component:
        return "the task's"
    [(name, options)] = component.items()
    listed = ", ".join(f"{option}={value}" for option, value in options.items())
    return f"{name}({listed})" if listed else name


def describe_architecture(trial: Trial) -> str:
    """Say on one line what a trial's model is."""
    architecture = trial.architecture
    return architecture.describe() if hasattr(architecture, "describe") else mixers(trial.encoded)


def format_count(count: float) -> str:
    """Write a count with three digits and a letter: `329 k`, `95.0 M`."""
    for size, letter in _UNIT_STEPS:
        if abs(count) >= size:
            scaled = count / size
            return f"{scaled:.{max(0, 3 - len(str(int(abs(scaled)))))}f} {letter}"
    return f"{count:g}"


def format_value(value: float, unit: str) -> str:
    """Write a number with its unit, to the digits that matter."""
    if unit == "bytes":
        return f"{format_count(value)}B" if abs(value) >= 1e3 else f"{value:g} B"
    text = format_count(value) if float(value).is_integer() and abs(value) >= 1e3 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def format_interval(quantity: Quantity) -> str:
    """Write the interval of a quantity, empty where it has none."""
    if quantity.interval is None:
        return ""
    low, high = quantity.interval
    return f"[{low:.4g}, {high:.4g}]"


def format_quantity(quantity: Quantity) -> str:
    """Write a quantity with its unit, interval, whether it is noisy, and its source where that says something."""
    parts = [format_value(quantity.value, quantity.unit), format_interval(quantity)]
    parts += [f"({quantity.source})"] if quantity.source not in ("counted", "measured", "custom") else []
    parts += [f"after {quantity.details['fraction']:.3g} of the budget"] if "fraction" in quantity.details else []
    parts += ["noisy"] if quantity.details.get("noisy") else []
    return " ".join(part for part in parts if part)


def format_duration(seconds: float) -> str:
    """Write a duration as `42 s`, `3:05` or `2:03:05`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
