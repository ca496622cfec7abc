"""The HTML of a report: one page without scripts, that refers to nothing outside itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nas.report.contents import Contents, format_time
from nas.report.figures import Drawing
from nas.report.models import render_models
from nas.summary import format_count, format_duration, format_interval, format_value, mixers, value_names
from nas.trial import Quantity, Trial

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_page(contents: Contents, drawings: Sequence[Drawing]) -> str:
    """Return the whole page.

    Args:
        contents: What to show.
        drawings: Its figures.
    """
    name = str(contents.settings["space"]["name"])
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    sections = (
        _head(contents, name),
        _figures(drawings),
        _front(contents),
        render_models(contents),
        _failures(contents),
        _circumstances(contents),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(name)}: Pareto front</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def render_table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """Return a table; cells are HTML.

    Args:
        heads: Headings, plain text.
        rows: Cells.
        numbers: Headings of columns that are aligned to the right.
    """
    kinds = [' class="number"' if head in numbers else "" for head in heads]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for kind, text in zip(kinds, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'


def _head(contents: Contents, name: str) -> str:
    settings, counted = contents.settings, contents.study.count()
    task, target = settings.get("task"), settings.get("target")
    goals = ", ".join(
        f"{'lowest' if goal['direction'] == 'min' else 'highest'} {goal['name']}" for goal in settings["objectives"]
    )
    about = [f"task {task['name']}" if task else "", f"target {target['name']}" if target else "", f"for the {goals}"]
    seconds = sum(trial.seconds for trial in contents.study.trials)
    facts = (
        (str(len(contents.front)), "models on the front"),
        (str(len(contents.sorted_out.certain)), "there for certain"),
        (str(counted["finished"]), "trials finished"),
        (str(counted["failed"]), "failed"),
        (str(counted["infeasible"]), "break a constraint"),
        *([(str(counted["stopped"]), "stopped early")] if counted["stopped"] else []),
        (format_duration(seconds), "of trials"),
        *_best_facts(contents),
    )
    items = "".join(f"<li><b>{escape(value)}</b><span>{escape(label)}</span></li>" for value, label in facts)
    lead = escape(", ".join(part for part in about if part))
    return f'<h1>{escape(name)}</h1>\n<p class="lead">Searched: {lead}.</p>\n<ul class="facts">{items}</ul>\n'


def _best_facts(contents: Contents) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for column, objective in enumerate(contents.study.goals.objectives):
        if contents.front:
            best = min(contents.front, key=lambda trial: trial.losses[column])
            quantity = best.quantities[objective.name]
            facts.append((format_value(quantity.value, quantity.unit), f"best {objective.name}, trial {best.number}"))
    return facts


def _figures(drawings: Sequence[Drawing]) -> str:
    if not drawings:
        return "<h2>Figures</h2>\n<p>No trial finished, so there is nothing to plot.</p>\n"
    parts = (
        f"<figure>\n<h3>{escape(drawing.title.capitalize())}</h3>\n{drawing.svg}"
        f"<figcaption>{escape(drawing.note)}</figcaption>\n</figure>\n"
        for drawing in drawings
    )
    return "<h2>Figures</h2>\n" + "".join(parts)


def _front(contents: Contents) -> str:
    if not contents.front:
        return "<h2>Pareto front</h2>\n<p>No trial finished within the constraints.</p>\n"
    names = value_names(contents.study)
    eager = any(contents.eager_ms(trial) is not None for trial in contents.front)
    heads = [
        "trial",
        "token mixers",
        "params",
        *names,
        *(["torch eager"] if eager else []),
        "on the front",
        "compiled vs torch",
        "artifact",
    ]
    nominal = {trial.number for trial in contents.front}
    others = [trial for trial in contents.sorted_out.possible if trial.number not in nominal]
    rows = [_front_row(contents, trial, names, eager) for trial in (*contents.front, *others)]
    return "<h2>Pareto front</h2>\n" + render_table(heads, rows, ("trial", "params")) + _yardstick(contents)


def _front_row(contents: Contents, trial: Trial, names: Sequence[str], eager: bool) -> list[str]:
    count = contents.parameters.get(trial.number)
    manifest = contents.manifests.get(trial.number)
    error = manifest["functions"]["forward"]["verification_error"] if manifest is not None else None
    return [
        _number(contents, trial),
        escape(mixers(trial.encoded)),
        "-" if count is None else format_count(count),
        *(_quantity(trial.quantities.get(name), name in trial.remeasured) for name in names),
        *([_eager(contents, trial)] if eager else []),
        _status(contents, trial),
        "-" if error is None else f"{error:.1e}",
        escape(trial.artifact or contents.unshipped.get(trial.number, "-")),
    ]


def _number(contents: Contents, trial: Trial) -> str:
    """Write a trial's number, as a link where the page shows the model."""
    is_shown = any(trial.number == other.number for other in contents.front)
    return f'<a href="#trial-{trial.number}">{trial.number}</a>' if is_shown else str(trial.number)


def _status(contents: Contents, trial: Trial) -> str:
    """Say whether a trial is on the front for certain, and what is in the way of that."""
    reason = contents.sorted_out.unsettled.get(trial.number)
    return contents.sorted_out.status(trial) + (f"<br><small>{escape(reason)}</small>" if reason else "")


def _quantity(quantity: Quantity | None, is_again: bool) -> str:
    """Write a quantity with its interval and source below it."""
    if quantity is None:
        return "-"
    remarks = [format_interval(quantity), quantity.source, "again" if is_again else ""]
    if quantity.details.get("noisy"):
        remarks.append('<span class="warm">noisy</span>')
    below = " ".join(remark for remark in remarks if remark)
    return f"{escape(format_value(quantity.value, quantity.unit))}<br><small>{below}</small>"


def _eager(contents: Contents, trial: Trial) -> str:
    eager_ms = contents.eager_ms(trial)
    own = [quantity.value for quantity in trial.quantities.values() if quantity.source == "measured"]
    if eager_ms is None:
        return "-"
    ratio = f"<br><small>{eager_ms / own[0]:.1f} times the compiled model</small>" if own else ""
    return f"{eager_ms:.4g} ms{ratio}"


def _yardstick(contents: Contents) -> str:
    found = contents.yardstick
    if found is None:
        return ""
    better = "lower" if found.direction == "min" else "higher"
    scores = (("chance", found.chance), *found.baselines.items())
    rows = [(escape(name), f"{score:.4g}") for name, score in scores]
    return (
        f'<p class="note">Quality is {escape(found.metric)} in {escape(found.unit)} on the validation split; '
        f"{better} is better. For comparison, on the same split:</p>\n" + render_table(("model", found.unit), rows)
    )


def _failures(contents: Contents) -> str:
    ended = [trial for trial in contents.study.trials if trial.state in ("failed", "infeasible")]
    if not ended:
        return ""
    rows = [
        (
            str(trial.number),
            trial.state,
            escape(mixers(trial.encoded)),
            escape(trial.reason)
            + (
                f"<details><summary>traceback</summary><pre>{escape(chr(10).join(trial.traceback))}</pre></details>"
                if trial.traceback
                else ""
            ),
        )
        for trial in ended
    ]
    return "<h2>Trials without a result</h2>\n" + render_table(
        ("trial", "state", "token mixers", "reason"), rows, ("trial",)
    )


def _circumstances(contents: Contents) -> str:
    header, settings = contents.header, contents.settings
    strategy = dict(settings["strategy"])
    rows: list[tuple[str, str]] = [
        ("seed", str(settings["seed"])),
        ("strategy", _mapping(strategy.pop("name"), strategy)),
        *((goal["name"], _goal(goal)) for goal in settings["objectives"]),
        *((f"constraint on {goal['name']}", _goal(goal)) for goal in settings["constraints"]),
    ]
    for name in ("task", "target"):
        if settings.get(name):
            described = dict(settings[name])
            rows.append((name, _mapping(described.pop("name"), described)))
    rows.append(("begun", format_time(header.get("time"))))
    rows += [(f"run {number}", _run(run)) for number, run in enumerate(contents.runs, 1)]
    versions = (contents.runs[-1] if contents.runs else header).get("versions", {})
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    rows += [("machine", machine) for machine in contents.machines]
    cells = [(escape(name), escape(value)) for name, value in rows]
    space = f"<details><summary>the search space</summary><pre>{escape(str(header.get('space', '')))}</pre></details>\n"
    return "<h2>Circumstances</h2>\n" + render_table(("", ""), cells) + space


def _mapping(name: object, options: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{option} {value}" for option, value in options.items() if value is not None)
    return f"{name}: {listed}" if listed else str(name)


def _goal(goal: Mapping[str, Any]) -> str:
    bounds = [f"at least {goal['min']}" if goal["min"] is not None else ""]
    bounds.append(f"at most {goal['max']}" if goal["max"] is not None else "")
    settings = [f"{name} {value}" for name, value in goal["settings"].items() if not isinstance(value, dict)]
    parts = [goal["source"], goal["unit"], *bounds, *settings]
    return ", ".join(part for part in parts if part)


def _run(run: Mapping[str, Any]) -> str:
    executor = dict(run.get("executor", {}))
    budget = ", ".join(f"{limit} {unit}" for unit, limit in run.get("budget", {}).items())
    return f"{format_time(run.get('time'))}, {budget}, executor {_mapping(executor.pop('name', '?'), executor)}"
