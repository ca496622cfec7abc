"""`nas replay`: propose the trials of a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import Json
from nas.cli.output import output, tell


def replay(
    run: Annotated[Path, typer.Argument(help="Run folder of `nas search`.")],
    json: Json = False,
) -> None:
    """Ask a run's strategy again, from its seed and journal, and compare each proposal with the recorded one.

    The exit code is 1 where one differs.
    """
    from nas.differences import changes
    from nas.replay import replay as run_again

    with output(json) as out:
        found = run_again(run)
        tell(*found.notices)
        if out.json:
            out.data(found.to_dict())
        elif found.first is None:
            out.text(f"{run}: all {found.checked} proposals came out as recorded")
        else:
            first = found.divergences[0]
            out.text(f"{run}: trial {first.trial} is the first of {len(found.divergences)} that come out otherwise")
            if first.proposed is None:
                out.text("  the strategy finds nothing new")
            else:
                listed = changes(first.recorded, first.proposed)
                out.text(*(f"  {item.path}: {item.first} recorded, {item.second} now" for item in listed))
            versions = (f"{name} {old} then, {new} now" for name, (old, new) in found.versions.items())
            out.text(*(f"  {line}" for line in versions))
    if found.first is not None:
        raise typer.Exit(1)
