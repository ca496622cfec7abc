"""What a report shows, gathered once from a study and its run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from nas.bench_results import read_results
from nas.front import Front
from nas.objectives.base import Objective
from nas.study import Study
from nas.summary import Yardstick, artifact_manifest, parameter_count, quality_name, yardstick
from nas.trial import Trial


@dataclass(frozen=True)
class Contents:
    """A study as its report sees it.

    Attributes:
        study: The study.
        front: Its Pareto front, best in the first objective first.
        sorted_out: What of it is certain, and what else may be on it.
        yardstick: Chance and baselines, None where there is no task or no data.
        quality: Name of the objective that the yardstick measures.
        parameters: Number of parameters of the trials of the front, where known.
        manifests: What the artifacts of the front say of themselves.
        benches: Results of `nas bench` by trial.
        unshipped: Why a trial has no artifact, where it could not be compiled.
        header: First record of the journal.
        runs: Records of the processes that ran the study.
    """

    study: Study
    front: tuple[Trial, ...]
    sorted_out: Front
    yardstick: Yardstick | None
    quality: str | None
    parameters: Mapping[int, int] = field(default_factory=dict[int, int])
    manifests: Mapping[int, Mapping[str, Any]] = field(default_factory=dict[int, Mapping[str, Any]])
    benches: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict[int, Sequence[Mapping[str, Any]]])
    unshipped: Mapping[int, str] = field(default_factory=dict[int, str])
    header: Mapping[str, Any] = field(default_factory=dict[str, Any])
    runs: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(cls, study: Study) -> Contents:
        """Gather the contents of a study's report."""
        sorted_out = study.front()
        front = sorted_out.nominal
        records = study.storage.records()
        counts = {trial.number: parameter_count(study, trial) for trial in front}
        manifests = {trial.number: artifact_manifest(study, trial) for trial in front}
        benches: dict[int, list[dict[str, Any]]] = {}
        for result in read_results(study.folder) if study.folder is not None else ():
            benches.setdefault(result["trial"], []).append(result)
        return cls(
            study=study,
            front=front,
            sorted_out=sorted_out,
            yardstick=yardstick(study),
            quality=quality_name(study),
            parameters={number: count for number, count in counts.items() if count is not None},
            manifests={number: manifest for number, manifest in manifests.items() if manifest is not None},
            benches=benches,
            unshipped={record["trial"]: record["reason"] for record in records if record["event"] == "unshipped"},
            header=records[0],
            runs=[record for record in records if record["event"] == "run"],
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        """Recorded settings of the study."""
        return self.header["settings"]

    @property
    def machines(self) -> list[str]:
        """Models of the CPUs that latency was measured on, the first one first."""
        found: dict[str, None] = {}
        for trial in self.study.trials:
            for quantity in (*trial.quantities.values(), *trial.remeasured.values()):
                if machine := quantity.details.get("machine"):
                    found[str(machine)] = None
        return list(found)

    def eager_ms(self, trial: Trial) -> float | None:
        """Return the time of a trial's model in torch eager on the threads that its latency was measured on."""
        wanted = {quantity.details.get("threads") for quantity in trial.quantities.values() if quantity.details}
        for result in self.benches.get(trial.number, ()):
            entry = result["results"].get("eager", {})
            if entry.get("status") == "ok" and (result["threads"] in wanted or wanted == {None}):
                return float(entry["median_ms"])
        return None

    def is_yardstick_of(self, objective: Objective) -> bool:
        """Tell whether chance and baselines are values of an objective."""
        return self.yardstick is not None and objective.name == self.quality


def format_time(seconds: float | None) -> str:
    """Write seconds since the epoch as a date and a time of day, UTC."""
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
