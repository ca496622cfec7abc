"""`nas diff`: what differs between two runs or two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.options import Json
from nas.cli.output import Output, make_table, output

if TYPE_CHECKING:
    from nas.differences import Change, ModelDifference, RunDifference, ValueChange


def diff(
    first: Annotated[str, typer.Argument(help="A run folder, RUN:TRIAL, or an artifact (.nas).")],
    second: Annotated[str, typer.Argument(help="What to compare it with; a run with a run, a model with a model.")],
    json: Json = False,
) -> None:
    """Say what differs: settings and fronts of two runs, or values and each layer of two models."""
    from nas.differences import RunDifference, compare

    with output(json) as out:
        found = compare(first, second)
        if out.json:
            out.data(found.to_dict())
        elif isinstance(found, RunDifference):
            _show_runs(found, out)
        else:
            _show_models(found, out)


def changes_table(title: str, first: str, second: str, rows: Sequence[Change], out: Output) -> None:
    """Write what differs, or that nothing does."""
    if not rows:
        out.text(f"{title}: the same")
        return
    table = make_table("where", first, second, title=title)
    for row in rows:
        table.add_row(row.path, row.first, row.second)
    out.table(table)


def value_cells(change: ValueChange) -> list[str]:
    """Return the cells of a value: its name, both values, the difference and its interval."""
    from nas.summary import format_value

    def write(value: float | None) -> str:
        return "-" if value is None else format_value(value, change.unit)

    interval = "" if change.interval is None else f"[{change.interval[0]:+.4g}, {change.interval[1]:+.4g}]"
    sign = "+" if change.difference is not None and change.difference > 0 else ""
    return [change.name, write(change.first), write(change.second), sign + write(change.difference), interval]


def _show_runs(found: RunDifference, out: Output) -> None:
    changes_table("settings", found.first, found.second, (*found.settings, *found.versions), out)
    changes_table("trials", found.first, found.second, found.trials, out)
    _show_values("best on each front", found.first, found.second, found.best, out)
    out.text(
        f"on both fronts: {len(found.both)} architectures",
        f"only on the front of {found.first}: {_numbers(found.only_first)}",
        f"only on the front of {found.second}: {_numbers(found.only_second)}",
    )


def _show_models(found: ModelDifference, out: Output) -> None:
    changes_table("architecture", found.first, found.second, found.architecture, out)
    _show_values("values", found.first, found.second, found.values, out)


def _show_values(title: str, first: str, second: str, values: Sequence[ValueChange], out: Output) -> None:
    if not values:
        return
    table = make_table("value", first, second, "difference", "between", title=title, right=("difference",))
    for change in values:
        table.add_row(*value_cells(change))
    out.table(table)


def _numbers(numbers: Sequence[int]) -> str:
    return "trial " + ", ".join(map(str, numbers)) if numbers else "none"
