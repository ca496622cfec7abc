"""Where a verb's words go: data on stdout, everything else on stderr, JSON alone on stdout."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from nas.callbacks import Callback

PIPE_WIDTH = 200
"""Columns of text that goes to no terminal: wide enough that no table is cut."""


def program() -> str:
    """Return what the user has to type to start this program again."""
    called = Path(sys.argv[0])
    if called.name != "nas":
        return "python -m nas" if called.name == "__main__.py" else "nas"
    found = shutil.which("nas")
    on_path = found is not None and called.exists() and os.path.samefile(found, called)
    return "nas" if on_path or called.parent == Path() else str(called)


def is_debugging() -> bool:
    """Tell whether the user asked for tracebacks."""
    return os.environ.get("NAS_DEBUG", "") not in ("", "0")


def tell(*lines: str) -> None:
    """Write lines to stderr."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def console(*, stderr: bool = False) -> Console:
    """Return a console that keeps to the width of a terminal, and cuts nothing elsewhere."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


class Output:
    """What a verb says to the user.

    With JSON wanted, whatever else this process or a library in it writes to stdout goes to stderr.

    Attributes:
        json: Whether JSON was asked for.
    """

    def __init__(self, json: bool = False, stream: IO[str] | None = None) -> None:
        self.json = json
        self._stream = stream or sys.stdout

    def data(self, data: Any) -> None:
        """Write data as JSON."""
        self._stream.write(json.dumps(data, indent=2, allow_nan=False, default=str) + "\n")
        self._stream.flush()

    def text(self, *lines: str) -> None:
        """Write lines: to stdout, or beside the JSON to stderr."""
        for line in lines:
            print(line, file=sys.stderr if self.json else sys.stdout)

    def table(self, table: Table) -> None:
        """Write a table: to stdout, or beside the JSON to stderr."""
        console(stderr=self.json).print(table)


@contextmanager
def output(as_json: bool) -> Iterator[Output]:
    """Give a verb its output; with JSON wanted, nothing else reaches stdout while it lasts.

    Args:
        as_json: Whether JSON was asked for.

    Yields:
        The output.
    """
    if not as_json:
        yield Output()
        return
    own = sys.stdout
    own.flush()
    saved = os.dup(1)
    os.dup2(2, 1)  # libraries and worker processes write to the descriptor, not to sys.stdout
    try:
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as descriptor, redirect_stdout(sys.stderr):
            yield Output(True, descriptor if _is_descriptor_1(own) else own)
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@contextmanager
def told(quiet: bool, what: str) -> Iterator[Callback]:
    """Give what tells on stderr how work on some trials goes, or nothing where that is not wanted.

    Args:
        quiet: Whether it is not wanted.
        what: What is done to the trial whose number follows.
    """
    from nas.callbacks import Callback
    from nas.progress import ShippingProgress

    if quiet:
        yield Callback()
        return
    listener = ShippingProgress(console(stderr=True), what)
    try:
        yield listener
    finally:
        listener.close()


def make_table(*columns: str, title: str | None = None, caption: str | None = None, right: Sequence[str] = ()) -> Table:
    """Return an empty table in the style of this program.

    Args:
        columns: Headings.
        title: Line above.
        caption: Line below.
        right: Headings of columns that are aligned to the right.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _is_descriptor_1(stream: IO[str]) -> bool:
    """Tell whether a stream writes to the process's stdout, rather than into a test's buffer."""
    try:
        return stream.fileno() == 1
    except OSError:
        return False
