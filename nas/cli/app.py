"""The program `nas`: its verbs, what it does with errors, and its exit codes.

Exit codes: 0 done, 1 anything that is not below, 2 bad input, 3 target or device not available, 130 interrupted.
A verb's heavy imports are inside it, so that `nas --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ir.errors import NasError
from nas.cli import (
    bench,
    bundle,
    check,
    compile,
    device,
    diff,
    doctor,
    lint,
    list,
    probe,
    profile,
    remeasure,
    replay,
    report,
    search,
    show,
    sign,
    verify,
    why,
)
from nas.cli.output import is_debugging, program, tell

FAILED, INTERRUPTED = 1, 130
_GO_ON = frozenset({"search", "profile", "remeasure"})
"""Verbs that save what they finish."""
_SAVED, _WHOLE = "what was finished is saved, and the same command goes on from there", "no file is half-written"
_IMPORT_GRACE_S = 0.05  # until an interrupt that fell into an import is tried again
_OF_THE_SYSTEM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE})


class _Verbs(TyperGroup):
    """Turn what a verb raises into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except NasError as error:
            _explain(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            tell(f"interrupted; {_SAVED if ctx.invoked_subcommand in _GO_ON else _WHOLE}")
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:  # such as `nas list components | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(FAILED) from error
        return result


app = typer.Typer(
    name="nas",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("search")(search.search)
app.command("show")(show.show)
app.command("list")(list.list_entries)
app.command("compile")(compile.compile_model)
app.command("bench")(bench.bench)
app.command("bundle")(bundle.bundle)
app.command("verify")(verify.verify)
app.command("sign")(sign.sign)
app.command("keygen")(sign.keygen)
app.command("check")(check.check)
app.command("probe")(probe.probe)
app.command("profile")(profile.profile)
app.command("remeasure")(remeasure.remeasure)
app.command("report")(report.report)
app.command("replay")(replay.replay)
app.command("diff")(diff.diff)
app.command("why")(why.why)
app.command("lint")(lint.lint)
app.command("doctor")(doctor.doctor)
app.add_typer(device.app, name="device")


def _show_version(wanted: bool) -> None:
    if wanted:
        from nas import __version__

        typer.echo(f"nas {__version__}")
        raise typer.Exit


@app.callback(epilog="Start with: nas search tiny_lm --trials 16   ·   nas doctor tells whether all is well here.")
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Search transformer-like models for the Pareto front of quality against measured latency of the compiled model."""


def main() -> NoReturn:
    """Run the program and end the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app(prog_name=program())
    except Exception as error:  # the last resort of the program; nothing is swallowed, see NAS_DEBUG
        if is_debugging():
            raise
        if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
            tell(f"error: {error.strerror}" + (f": {error.filename}" if error.filename else ""))
            sys.exit(FAILED)
        tell(f"error: {type(error).__name__}: {error}", "  this is a fault of the program; NAS_DEBUG=1 shows where")
    sys.exit(FAILED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End on SIGTERM as on Ctrl-C, so that workers are stopped and locks are released.

    An import is let finish first: libraries such as torch abort the process when one of their own is interrupted.
    """
    if _is_importing(frame):
        again = threading.Timer(_IMPORT_GRACE_S, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _explain(error: NasError) -> None:
    if is_debugging():
        raise error
    tell(f"error: {error}")
