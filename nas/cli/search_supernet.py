"""What `nas search --quality supernet` does besides: a supernet before the search, the winners trained after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import InputError, did_you_mean
from nas.cli.output import tell

if TYPE_CHECKING:
    from nas.objectives.base import Objective
    from nas.objectives.quality import Quality
    from nas.study import Study
    from nas.supernet.search import Prepared

SOURCES = ("trained", "supernet")
_SHOWN_TIMES = 20  # lines about one training


@dataclass(frozen=True)
class SupernetSearch:
    """A search whose quality a supernet gives, or was to give.

    Attributes:
        prepared: The objective and the audit behind it.
        quality: How winners are trained.
        winners: How many models to train alone after the search; None takes as many as the supernet's front has.
        quiet: Whether nothing is said on the way.
    """

    prepared: Prepared
    quality: Quality
    winners: int | None
    quiet: bool

    def judged(
        self, objectives: list[Objective], constraints: list[Objective]
    ) -> tuple[list[Objective], list[Objective]]:
        """Return objectives and constraints with quality judged as prepared; bounds on quality become its own."""
        chosen: Any = self.prepared.objective
        for low, high in (bound.bounds for bound in constraints if bound.name == chosen.name):
            chosen = replace(chosen, **({"min": low} if low is not None else {"max": high}))
        replaced = [chosen if objective.name == chosen.name else objective for objective in objectives]
        return replaced, [bound for bound in constraints if bound.name != chosen.name]

    def finish(self, study: Study) -> None:
        """Train the winners alone where the search ranked by shared weights."""
        from nas.supernet.search import train_winners

        if self.prepared.objective.source == "supernet":
            train_winners(study, self.quality, self.prepared, count=self.winners, notice=None if self.quiet else tell)

    def describe(self, study: Study) -> dict[str, Any]:
        """Return what a reader of the result should know of it, as JSON."""
        from nas.supernet.search import alone_score

        audit = self.prepared.audit
        scores = {trial.number: alone_score(trial, self.quality.name) for trial in study.trials}
        return {
            "quality_source": self.prepared.objective.source,
            "audit": {"tau": audit.tau, "interval": list(audit.interval), "threshold": audit.threshold}
            | {"supernet": list(audit.supernet), "alone": list(audit.alone)},
            "trained_alone": {str(number): score.value for number, score in scores.items() if score is not None},
        }

    def lines(self, study: Study) -> list[str]:
        """Say how well the supernet ranked, and what the winners score when trained alone."""
        from nas.summary import format_quantity
        from nas.supernet.search import alone_score

        found = [f"  {self.prepared.audit}"]
        for trial in study.trials:
            alone = alone_score(trial, self.quality.name)
            if alone is not None:
                shared = format_quantity(trial.quantities[self.quality.name])
                found.append(f"  trial {trial.number}: {shared}; trained alone: {format_quantity(alone)}")
        return ["Quality by a supernet:", *found, ""]


def prepare_supernet(
    source: str,
    space: Any,
    folder: Path,
    objectives: list[Objective],
    constraints: list[Objective],
    *,
    seed: int,
    steps: int | None,
    threshold: float | None,
    winners: int | None,
    threads: int | None,
    quiet: bool,
) -> SupernetSearch | None:
    """Train and audit a supernet where the command line asks for one.

    Args:
        source: What --quality was given.
        space: The space.
        folder: Run folder.
        objectives: Those of the command line, quality among them.
        constraints: Those of the command line.
        seed: Seed of the study.
        steps: What --supernet-steps was given.
        threshold: What --least-tau was given.
        winners: What --winners was given.
        threads: Torch threads while training.
        quiet: Whether nothing is said on the way.

    Returns:
        None where every trial is to be trained anyway.

    Raises:
        InputError: No such source, options without it, or a folder with a study of another source.
    """
    from nas.objectives.quality import Quality

    quality = next((objective for objective in objectives if isinstance(objective, Quality)), None)
    _require_sense(source, {"--supernet-steps": steps, "--least-tau": threshold, "--winners": winners}, quality, folder)
    if source == "trained" or quality is None:
        return None
    from nas.search import resolve_task, space_constraints, with_suggestions
    from nas.supernet.audit import LEAST_TAU
    from nas.supernet.search import prepare_quality

    task = resolve_task(None, space)
    chosen: Any = with_suggestions(quality, space, task)

    def show(step: int, total: int, loss: float) -> None:
        if step % max(1, total // _SHOWN_TIMES) == 0 or step == total:
            tell(f"supernet {step}/{total}, loss {loss:.3f}")

    prepared = prepare_quality(
        space,
        task,
        chosen,
        folder,
        seed=seed,
        steps=steps,
        constraints=[*space_constraints(space), *constraints],
        threads=threads,
        threshold=LEAST_TAU if threshold is None else threshold,
        notice=None if quiet else tell,
        progress=None if quiet else show,
    )
    return SupernetSearch(prepared, chosen.bind(task), winners, quiet)


def _require_sense(source: str, options: dict[str, Any], quality: Quality | None, folder: Path) -> None:
    """Refuse what does not fit together before anything is trained."""
    from nas.storages.journal import JOURNAL_NAME
    from nas.supernet.search import SUPERNET_FILE

    if source not in SOURCES:
        hint = did_you_mean(source, SOURCES)
        known = ", ".join(SOURCES)
        raise InputError("unknown source of quality", where="--quality", expected=known, found=source, hint=hint)
    unused = [option for option, value in options.items() if value is not None and source == "trained"]
    if unused:
        raise InputError(
            f"{unused[0]} needs a supernet", where=unused[0], expected="--quality supernet", found=f"--quality {source}"
        )
    if source == "supernet" and quality is None:
        raise InputError(
            "a supernet gives quality, which is no objective", where="--quality", expected="--objective quality"
        )
    if source == "supernet" and (folder / JOURNAL_NAME).exists() and not (folder / SUPERNET_FILE).exists():
        raise InputError(
            "this folder holds a study without a supernet",
            where=str(folder),
            expected=f"{SUPERNET_FILE} beside its journal",
            found="none",
            hint="give another folder, or leave out --quality supernet",
        )
