"""`nas report`: a run as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import Json
from nas.cli.output import output, tell


def report(
    run: Annotated[Path, typer.Argument(help="Run folder of `nas search`.")],
    bench: Annotated[
        bool, typer.Option("--bench", help="First time each artifact beside torch eager, for the reference line.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the report; RUN/report by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a run as one self-contained HTML page, with its figures as PNG files beside it."""
    from nas.cli.models import open_run
    from nas.report.write import write_report

    with output(json) as stream:
        study = open_run(str(run))
        if bench:
            from nas.cli.bench import bench_run

            bench_run(study, ["eager"], [study.evaluator.threads], tell=tell)
        written = write_report(study, out)
        if stream.json:
            stream.data({"report": str(written.page), "figures": [str(path) for path in written.figures]})
        else:
            stream.text(str(written.page), *(f"{path}" for path in written.figures))
