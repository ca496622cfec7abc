"""The command line: `nas VERB ...`, one file for each verb."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the program and end the process.

    `nas device serve` is served without what the others need: a device has numpy and the TVM runtime, nothing else.
    """
    if sys.argv[1:3] == ["device", "serve"]:
        from codegen.devices.serve import main as serve

        sys.exit(serve(sys.argv[3:]))
    from nas.cli.app import main as run

    run()
