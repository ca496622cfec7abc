"""`nas remeasure`: measure the points of a run's front again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.cli import device as device_options
from nas.cli.options import Json
from nas.cli.output import output, told

DEFAULT_SECONDS = 4.0


def remeasure(
    run: Annotated[Path, typer.Argument(help="Run folder of `nas search`.")],
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Trainings behind each quality; above 1, with other seeds too."),
    ] = 1,
    seconds: Annotated[float, typer.Option(help="For measuring one model, beside compiling it.")] = DEFAULT_SECONDS,
    device: device_options.Address = None,
    secret_file: device_options.SecretFile = None,
    tls_ca: device_options.TlsCa = None,
    tls_fingerprint: device_options.TlsFingerprint = None,
    device_wait: device_options.Wait = device_options.DEFAULT_WAIT_S,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    json: Json = False,
) -> None:
    """Measure what is on a run's front, or may be, again: neighbours in turns, until their intervals part.

    Each result is added to the run's journal; the front is then certain where no interval overlaps another's.
    """
    from nas.cli.models import open_run
    from nas.cli.search import front_table
    from nas.remeasure import remeasure as measure_again
    from nas.search import load_study
    from nas.summary import front_lines, result_json

    with output(json) as out:
        open_run(str(run))  # says what is wrong with a folder that holds none
        measured_on = device_options.find_device(device, secret_file, tls_ca, tls_fingerprint, device_wait)
        with load_study(run, hold=True, device=measured_on) as study, told(quiet, "again trial") as listener:
            front = measure_again(study, seeds=seeds, seconds=seconds, again=True, callback=listener)
        if out.json:
            out.data(result_json(study))
            return
        out.table(front_table(study, front.nominal))
        out.text(*front_lines(front))
