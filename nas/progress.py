"""Progress of a study on a terminal, or as plain lines where there is none."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from nas.budget import Budget
from nas.callbacks import Callback
from nas.summary import format_duration, format_quantity, format_value, mixers
from nas.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nas.study import Study

Clock = Callable[[], float]

_STEP: Final = re.compile(r"(\w+) (\d+)/(\d+)")
_LINE_EVERY_S: Final = 10.0  # plain lines about a stage that goes on


class SearchProgress(Callback):
    """Tell a user all the time what a study does: what runs, how far it is, the best so far, and when it ends.

    Args:
        console: Where to; on a terminal the state is redrawn in place, elsewhere it becomes lines.
        budget: Limits of the run, for what is left.
        clock: Seconds, monotonic.
    """

    def __init__(self, console: Console, budget: Budget, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._budget = budget
        self._clock = clock
        self._begun = clock()
        self._ended_here = 0
        self._running: dict[int, str] = {}
        self._bars = _Bars(console) if console.is_terminal else None
        self._said: tuple[int, str] = (-1, "")
        self._said_at = clock()
        self._objectives: frozenset[str] = frozenset()

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        """Pickle as a callback that is silent: Ray Tune copies all that a study holds, and a terminal has no copy."""
        return Callback, ()

    def on_start(self, study: Study) -> None:
        """Say what is resumed, and start drawing."""
        self._begun = self._clock()
        self._objectives = frozenset(metric.name for metric in study.goals.metrics)
        counted = study.count()
        ended = sum(count for state, count in counted.items() if state != "running")
        if ended or study.interrupted:
            again = f", {study.interrupted} to run again" if study.interrupted else ""
            self._say(f"resuming {study.folder}: {_plural(ended, 'trial')} kept{again}")
        if self._bars is not None:
            self._bars.begin(self._budget.trials, ended)
        self._draw(study)

    def on_trial(self, study: Study, trial: Trial) -> None:
        """Show a trial that starts."""
        self._running[trial.number] = "starting"
        self._say(f"trial {trial.number}{self._of()}: {mixers(trial.encoded)}", quiet_on_terminal=True)
        self._draw(study)

    def on_stage(self, number: int, stage: str) -> None:
        """Show the stage of a trial."""
        self._running[number] = stage
        if self._bars is not None:
            self._bars.show(f"trial {number}", stage)
            return
        if stage in self._objectives:  # what follows says more
            return
        head = stage.split(" ")[0]
        now = self._clock()
        if (number, head) != self._said or now - self._said_at >= _LINE_EVERY_S:
            self._said, self._said_at = (number, head), now
            self._say(f"trial {number}: {stage}")

    def on_result(self, study: Study, trial: Trial) -> None:
        """Show how a trial ended, the best so far and the time left."""
        self._running.pop(trial.number, None)
        self._ended_here += 1
        self._say(f"trial {trial.number}{self._of()} {_describe_end(trial)}")
        if self._bars is None:
            self._say(f"  best: {_best(study)}{self._left(study)}")
        else:
            self._bars.count()
            self._bars.show("", "" if self._running else "proposing")
        self._draw(study)

    def on_rung(self, study: Study, trial: Trial) -> None:
        """Show what a trial is worth after part of its budget."""
        self._running.pop(trial.number, None)
        rung = trial.rungs[-1]
        values = ", ".join(f"{name} {format_quantity(quantity)}" for name, quantity in rung.quantities.items())
        self._say(f"trial {trial.number}: {values}", quiet_on_terminal=True)
        self._draw(study)

    def on_notice(self, message: str) -> None:
        """Show a notice."""
        self._say(message, style="yellow")

    def on_end(self, study: Study) -> None:
        """Stop drawing."""
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; a second call does nothing."""
        if self._bars is not None:
            self._bars.stop()

    def _draw(self, study: Study) -> None:
        if self._bars is None:
            return
        running = [number for number in self._running if number >= 0]
        if len(running) > 1:
            self._bars.show(f"trials {', '.join(map(str, sorted(running)))}", "running")
        elif running and self._running[running[0]] == "starting":
            self._bars.show(f"trial {running[0]}", "starting")
        elif not running:
            self._bars.show("", "proposing")
        self._bars.footer = f"best so far: {_best(study)}{self._left(study)}"

    def _of(self) -> str:
        return "" if self._budget.trials is None else f" of {self._budget.trials}"

    def _left(self, study: Study) -> str:
        """Say how long the rest will take, from the pace of this run."""
        elapsed = self._clock() - self._begun
        left: list[float] = []
        if self._budget.trials is not None and self._ended_here:
            ended = sum(count for state, count in study.count().items() if state != "running")
            left.append(elapsed / self._ended_here * max(0, self._budget.trials - ended))
        if self._budget.hours is not None:
            left.append(max(0.0, 3600 * self._budget.hours - elapsed))
        return f"; about {format_duration(min(left))} left" if left and min(left) > 0 else ""

    def _say(self, line: str, *, style: str | None = None, quiet_on_terminal: bool = False) -> None:
        if self._bars is None:
            self._console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
        elif not quiet_on_terminal:
            self._bars.console.print(line, style=style, markup=False, highlight=False)


class ShippingProgress(Callback):
    """Tell which model of the front is being compiled, or measured again.

    Args:
        console: Where to.
        what: What is done to the trial whose number follows.
    """

    def __init__(self, console: Console, what: str = "artifact of trial") -> None:
        self._console, self._what = console, what
        self._bars = _Bars(console) if console.is_terminal else None
        if self._bars is not None:
            self._bars.begin(None, 0)

    def on_stage(self, number: int, stage: str) -> None:
        """Show the stage of a model."""
        if self._bars is not None:
            self._bars.show(f"{self._what} {number}", stage)
        else:
            self._console.print(f"{self._what} {number}: {stage}", markup=False, highlight=False, soft_wrap=True)

    def on_notice(self, message: str) -> None:
        """Show a notice."""
        self._console.print(message, style="yellow", markup=False, highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bars is not None:
            self._bars.stop()


class _Bars(Progress):
    """One bar for the study, one for what runs now, and a line below."""

    def __init__(self, console: Console) -> None:
        self.footer = ""
        self._shown = ""
        self._study: TaskID | None = None
        self._stage: TaskID | None = None
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    def begin(self, total: int | None, done: int) -> None:
        """Start drawing."""
        if total is not None:
            self._study = self.add_task("trials", total=total, completed=done, text=f"{done} of {total}")
        self._stage = self.add_task("", total=None, text="")
        self.start()

    def count(self) -> None:
        """Count an ended trial."""
        if self._study is not None:
            state = self.tasks[self.task_ids.index(self._study)]
            done = int(state.completed) + 1
            self.update(self._study, completed=done, text=f"{done} of {int(state.total or done)}")

    def show(self, what: str, stage: str) -> None:
        """Show what runs and how far it is."""
        if self._stage is None:
            return
        if what != self._shown:
            self._shown = what
            self.reset(self._stage)
        step = _STEP.match(stage)
        total, completed = (int(step[3]), int(step[2])) if step else (None, 0)
        self.update(self._stage, description=what, text=stage, total=total, completed=completed)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, and the line below them."""
        yield self.make_tasks_table(self.tasks)
        if self.footer:
            yield Text(self.footer)


def _best(study: Study) -> str:
    """Say what the best feasible value of each objective is, and whose."""
    trials = [trial for trial in study.trials if trial.is_feasible]
    if not trials:
        return "nothing yet"
    parts: list[str] = []
    for column, objective in enumerate(study.goals.objectives):
        trial = min(trials, key=lambda item: (item.losses[column], item.number))
        quantity = trial.quantities[objective.name]
        parts.append(f"{objective.name} {format_value(quantity.value, quantity.unit)} (trial {trial.number})")
    return ", ".join(parts)


def _describe_end(trial: Trial) -> str:
    if trial.state == "finished":
        values = ", ".join(f"{name} {format_quantity(quantity)}" for name, quantity in trial.quantities.items())
        return f"finished in {format_duration(trial.seconds)}: {values}"
    return f"{trial.state}: {trial.reason}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
