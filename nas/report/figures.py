"""Figures of a report: SVG that takes its colours and font from the page, and PNG that stands alone."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from nas.objectives.base import Objective
from nas.report.contents import Contents
from nas.trial import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins: matplotlib writes them into the SVG, where they become variables of the page's style sheet.
_INK, _RULE, _ACCENT, _FAINT, _WARM = "#24292f", "#d8dee5", "#0a66c2", "#8c96a1", "#b3541e"
_VARIABLES = {_INK: "ink", _RULE: "rule", _ACCENT: "accent", _FAINT: "faint", _WARM: "warm"}

_STYLE: Any = {
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.color": _FAINT,
    "ytick.labelcolor": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "nas",
}
_LOG_FROM_RATIO = 20.0
_REACH = 0.75  # how far, in spans of the values, a reference line may lie outside them and still be drawn


@dataclass(frozen=True)
class Drawing:
    """A figure in both forms.

    Attributes:
        name: File name without suffix.
        title: Heading, for people.
        note: What to know when reading it.
        svg: For the page.
        png: To stand alone.
    """

    name: str
    title: str
    note: str
    svg: str
    png: bytes


def draw_front(contents: Contents, y: Objective, x: Objective) -> Drawing | None:
    """Draw all trials and the front against two objectives.

    Args:
        contents: The study.
        y: Vertical.
        x: Horizontal.

    Returns:
        None where no trial has both values.
    """
    trials = [trial for trial in contents.study.trials if y.name in trial.values and x.name in trial.values]
    if not trials:
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 4.9), layout="constrained")
        axes = figure.add_subplot()
        on_front = {trial.number for trial in (*contents.sorted_out.certain, *contents.sorted_out.possible)}
        others = [trial for trial in trials if trial.number not in on_front]
        _scatter(axes, [t for t in others if t.is_feasible], x, y, "other trials", color=_FAINT, s=26)
        broken = [t for t in others if not t.is_feasible]
        _scatter(axes, broken, x, y, "breaks a constraint", facecolors="none", edgecolors=_FAINT, s=26)
        _draw_front_line(axes, contents, x, y)
        eager = _draw_eager(axes, contents, x, y)
        missed = _draw_reference_lines(axes, contents, y, [trial.values[y.name] for trial in trials])
        values = [trial.values[x.name] for trial in trials] + eager
        if min(values) > 0 and max(values) / min(values) > _LOG_FROM_RATIO:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(_label(x))
        axes.set_ylabel(_label(y))
        axes.margins(0.08)
        axes.legend(loc="best", fontsize=9)
        note = "Hollow points may be on the front: see the table. " if contents.sorted_out.possible else ""
        note += "Bars are intervals: 95 % of a measured median, the range over seeds of a trained score. "
        note += f"Off the scale: {', '.join(missed)}." if missed else ""
        return _finish(figure, f"front_{y.name}_{x.name}", f"{y.name} against {x.name}", note)


def draw_history(contents: Contents) -> Drawing | None:
    """Draw the values of each objective in the order of trials, and the best so far.

    Returns:
        None where no trial finished.
    """
    finished = [trial for trial in contents.study.trials if trial.is_feasible]
    if not finished:
        return None
    objectives = contents.study.goals.objectives
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.2, 2.2 * len(objectives) + 0.6), layout="constrained")
        panels = figure.subplots(len(objectives), 1, sharex=True, squeeze=False)[:, 0]
        for axes, objective in zip(panels, objectives, strict=True):
            numbers = [trial.number for trial in finished]
            values = [trial.values[objective.name] for trial in finished]
            pick = min if objective.direction == "min" else max
            best = [pick(values[: index + 1]) for index in range(len(values))]
            axes.scatter(numbers, values, color=_FAINT, s=18)
            axes.step(numbers, best, where="post", color=_ACCENT, linewidth=1.8)
            axes.set_ylabel(f"{objective.name}, {objective.unit}" if objective.unit else objective.name)
        panels[-1].set_xlabel("trial")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)
        return _finish(figure, "history", "The search, trial by trial", "The line is the best so far.")


def _scatter(axes: Axes, trials: Sequence[Trial], x: Objective, y: Objective, label: str, **style: Any) -> None:
    if trials:
        axes.scatter([t.values[x.name] for t in trials], [t.values[y.name] for t in trials], label=label, **style)


def _draw_front_line(axes: Axes, contents: Contents, x: Objective, y: Objective) -> None:
    """Draw the front: certain points filled, possible ones hollow, with their intervals and the numbers of trials."""
    ordered = sorted(contents.front, key=lambda trial: trial.values[x.name])
    where = "post" if x.direction == "min" else "pre"  # a point rules until the next better one
    axes.step(
        [trial.values[x.name] for trial in ordered],
        [trial.values[y.name] for trial in ordered],
        where=where,
        color=_ACCENT,
        linewidth=1.2,
        alpha=0.55,
    )
    certain, possible = contents.sorted_out.certain, contents.sorted_out.possible
    _scatter(axes, certain, x, y, "on the front for certain", color=_ACCENT, s=44, zorder=3)
    hollow: Any = {"facecolors": "none", "edgecolors": _ACCENT, "linewidths": 1.4, "s": 44, "zorder": 3}
    _scatter(axes, possible, x, y, "may be on the front", **hollow)
    side, height = (-1 if x.direction == "min" else 1), (5 if y.direction == "max" else -12)  # where no other trial is
    for trial in (*certain, *possible):
        point = trial.values[x.name], trial.values[y.name]
        _draw_intervals(axes, trial, x, y)
        axes.annotate(
            str(trial.number),
            point,
            xytext=(5 * side, height),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            fontsize=9,
            color=_INK,
        )


def _draw_intervals(axes: Axes, trial: Trial, x: Objective, y: Objective) -> None:
    style: Any = {"color": _ACCENT, "linewidth": 3, "alpha": 0.45, "solid_capstyle": "butt"}
    if (across := trial.quantities[x.name].interval) is not None:
        axes.plot(across, (trial.values[y.name],) * 2, **style)
    if (upright := trial.quantities[y.name].interval) is not None:
        axes.plot((trial.values[x.name],) * 2, upright, **style)


def _draw_eager(axes: Axes, contents: Contents, x: Objective, y: Objective) -> list[float]:
    """Mark the same models in torch eager, where they were timed; return those times."""
    if x.source != "measured":
        return []
    times: list[float] = []
    for trial in contents.front:
        eager_ms = contents.eager_ms(trial)
        if eager_ms is None:
            continue
        height = trial.values[y.name]
        label = None if times else "the same models in torch eager"
        axes.scatter([eager_ms], [height], marker="x", color=_WARM, s=40, zorder=3, label=label)
        axes.plot((trial.values[x.name], eager_ms), (height, height), color=_WARM, linewidth=0.9, linestyle=":")
        times.append(eager_ms)
    return times


def _draw_reference_lines(axes: Axes, contents: Contents, y: Objective, values: Sequence[float]) -> list[str]:
    """Draw chance and baselines as lines; return what lies too far from the values to be drawn."""
    if contents.yardstick is None or not contents.is_yardstick_of(y):
        return []
    low, high = min(values), max(values)
    reach = _REACH * ((high - low) or abs(high) or 1.0)
    missed: list[str] = []
    for name, score in (("chance", contents.yardstick.chance), *contents.yardstick.baselines.items()):
        if not low - reach <= score <= high + reach:
            missed.append(f"{name} {score:.3g}")
            continue
        axes.axhline(score, color=_WARM, linewidth=1, linestyle="--")
        axes.annotate(
            f"{name} {score:.3g}",
            (1.0, score),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=_WARM,
        )
    return missed


def _label(objective: Objective) -> str:
    unit = f", {objective.unit}" if objective.unit else ""
    return f"{objective.name}{unit} ({'lower' if objective.direction == 'min' else 'higher'} is better)"


def _finish(figure: Figure, name: str, title: str, note: str) -> Drawing:
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=144, facecolor="white")
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Drawing(name, title, note.strip(), _for_page(svg.getvalue(), name, title), png.getvalue())


def _for_page(svg: str, name: str, title: str) -> str:
    """Turn an SVG document into an element of the page: its colours, its font, and names of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    svg = re.sub(r"font-family: 'DejaVu Sans'[^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
