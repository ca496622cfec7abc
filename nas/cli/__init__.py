"""The command line: `nas VERB ...`, one file for each verb."""

from nas.cli.app import main

__all__ = ["main"]
