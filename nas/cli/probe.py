"""`nas probe`: what the layers of an architecture can do."""

from __future__ import annotations

from typing import Annotated

import typer

from nas.cli.options import Json
from nas.cli.output import make_table, output, tell


def probe(
    space: Annotated[str, typer.Argument(help="A published architecture such as zoo/mamba, or another space.")],
    steps: Annotated[int, typer.Option(min=1, help="Updates on each task.")] = 400,
    d_model: Annotated[int, typer.Option(min=8, help="Width of the model that is trained.")] = 64,
    tasks: Annotated[str | None, typer.Option(help="Which tasks, with commas; all when omitted.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data.")] = 0,
    json: Json = False,
) -> None:
    """Train a small model of an architecture's layers on tasks that tell mixers apart.

    Recall of pairs, induction, selective copying, nested lists, regression in context, digits as pixels and as images;
    each score is a share of the way from chance to an algorithm that solves the task.
    """
    from nas.probe import PROBES
    from nas.probe import probe as run

    with output(json) as out:
        wanted = PROBES if tasks is None else tuple(tasks.split(","))
        report = run(
            space, steps=steps, d_model=d_model, only=wanted, seed=seed, progress=lambda task: tell(f"  {task}")
        )
        if out.json:
            out.data(report.to_dict())
            return
        out.text(f"{report.name}: {report.model}, {report.steps} steps")
        table = make_table("task", "share", "score", "chance", "oracle", "note", right=("share", "score"))
        for score in report.scores:
            share = "-" if score.share is None else f"{score.share:.2f}"
            value = "-" if score.value is None else f"{score.value:.4g}"
            table.add_row(score.task, share, value, f"{score.chance:.4g}", f"{score.oracle:.4g}", score.note)
        out.table(table)
