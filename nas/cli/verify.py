"""`nas verify`: check an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import Json
from nas.cli.output import output


def verify(
    artifact: Annotated[Path, typer.Argument(help="A .nas file.")],
    key: Annotated[
        Path | None, typer.Option("--key", help="Public key; demand that its owner signed the file.")
    ] = None,
    json: Json = False,
) -> None:
    """Check an artifact's checksums, format, instruction set and versions, and run its self-tests."""
    from nas.api import verify as check

    with output(json) as out:
        report = check(artifact, key=key)
        errors = [fields["verification_error"] for fields in report.manifest["functions"].values()]
        error = max((one for one in errors if one is not None), default=None)
        if out.json:
            out.data(
                {
                    "artifact": str(report.path),
                    "ok": True,
                    "checks": list(report.checks),
                    "max_error": report.max_error,
                    "tolerance": report.tolerance,
                    "verification_error": error,
                }
            )
            return
        out.text(*(f"ok  {line}" for line in report.checks))
        against = "" if error is None else f"; it agreed with torch within {error:.1e} when it was compiled"
        out.text(f"{artifact} is whole and runs here{against}")
