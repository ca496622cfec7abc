"""`nas why`: what a trial changed, and what that cost or gained."""

from __future__ import annotations

from typing import Annotated

import typer

from nas.cli.options import Json
from nas.cli.output import make_table, output


def why(
    run: Annotated[str, typer.Argument(help="Run folder of `nas search`.")],
    trial: Annotated[int, typer.Argument(min=0, help="Number of the trial.")],
    base: Annotated[
        int | None,
        typer.Option("--base", min=0, help="Trial to compare with; the most similar earlier one by default."),
    ] = None,
    json: Json = False,
) -> None:
    """Compare a trial with the most similar one before it: each change, and what all of them cost or gained."""
    from nas.cli.diff import changes_table, value_cells
    from nas.cli.models import open_run
    from nas.why import why as explain

    with output(json) as out:
        found = explain(open_run(run), trial, base=base)
        if out.json:
            out.data(found.to_dict())
            return
        if found.reason:
            out.text(f"trial {found.trial}: {found.reason}")
        if found.note:
            said = ", ".join(f"{name} {value}" for name, value in found.note.items())
            out.text(f"trial {found.trial} was proposed with: {said}")
        if found.base is None:
            out.text(f"trial {found.trial} has no trial with a result before it")
            return
        names = (f"trial {found.base}", f"trial {found.trial}")
        changes_table("architecture", *names, found.changes, out)
        table = make_table("value", *names, "difference", "between", "", title="values", right=("difference",))
        for effect in found.effects:
            table.add_row(*value_cells(effect.value), effect.verdict)
        out.table(table)
        if len(found.changes) > 1:
            out.text(f"the {len(found.changes)} changes together made the difference")
