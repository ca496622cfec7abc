"""The command line: `nas VERB ...`, one file for each verb."""

from __future__ import annotations

import atexit
import gc
import sys
from typing import Final, NoReturn

__all__ = ["main"]

_COLLECT_AFTER: Final = 10_000
"""New objects between two collections of garbage: torch and TVM make a million that stay, and with the usual 700 a
quarter of the time that importing them takes goes into looking through them."""


def main() -> NoReturn:
    """Run the program and end the process.

    `nas device serve` is served without what the others need: a device has numpy and the TVM runtime, nothing else.
    """
    if sys.argv[1:3] == ["device", "serve"]:
        from codegen.devices.serve import main as serve

        sys.exit(serve(sys.argv[3:]))
    gc.set_threshold(_COLLECT_AFTER)
    atexit.register(gc.freeze)  # the end of the process looks through them once more, for half a second
    from nas.cli.app import main as run

    run()
