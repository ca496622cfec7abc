"""`nas bundle`: artifacts with all that runs them, for a machine with Python and numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import Json
from nas.cli.output import output


def bundle(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Files (.nas), for one processor.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .tar.gz, or a new folder.")] = Path("bundle.tar.gz"),
    json: Json = False,
) -> None:
    """Pack artifacts with the TVM runtime and a runner, for a machine that has Python and numpy and nothing else.

    There, `python run.py check|bench|run|serve` checks, times and runs them, or offers the machine for measuring.
    """
    from codegen.bundle import LARGEST_BYTES, write_bundle

    with output(json) as stream:
        written = write_bundle(artifacts, out)
        if stream.json:
            stream.data({"bundle": str(written.path), "bytes": written.size_bytes, "parts": dict(written.parts)})
            return
        parts = ", ".join(f"{name} {size / 2**20:.2f}" for name, size in written.parts.items())
        stream.text(
            f"{written.path}: {written.size_bytes / 2**20:.2f} of {LARGEST_BYTES / 2**20:.0f} MiB",
            f"  unpacked, MiB: {parts}",
            "Next, there: python run.py check",
        )
