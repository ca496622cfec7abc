"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from ir.errors import InputError, did_you_mean

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, all else on stderr.")]
TargetName: TypeAlias = Annotated[str, typer.Option("--target", help="What to compile for; `nas list targets`.")]
Threads: TypeAlias = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of the compiled model; all CPUs when omitted.")
]
_MODEL_HELP = "A run folder, an artifact (.nas), a graph (.json, .txt), or a search space (a YAML file or a name)."
Model: TypeAlias = Annotated[str, typer.Argument(help=_MODEL_HELP)]
ModelOrNone: TypeAlias = Annotated[str | None, typer.Argument(help=_MODEL_HELP, show_default=False)]
TrialNumber: TypeAlias = Annotated[
    int | None, typer.Option("--trial", min=0, help="Which trial of a run; the best of its front when omitted.")
]
Pick: TypeAlias = Annotated[
    str, typer.Option("--pick", help="Which architecture of a space: smallest, centroid, largest, or a sample's seed.")
]
TuningDir: TypeAlias = Annotated[
    Path | None, typer.Option("--tuning-dir", help="Folder of the tuning databases; by default in the cache.")
]


def parse_list(text: str, option: str, known: tuple[str, ...] | None = None) -> list[str]:
    """Split a comma-separated list.

    Args:
        text: What the user gave.
        option: Name of the option, for the message.
        known: What may be in it; anything where None.

    Raises:
        InputError: It is empty or has an unknown part.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in parts if known is not None and part not in known]
    if not parts or unknown:
        raise InputError(
            "bad list",
            where=option,
            expected="names with commas between them" + (f", out of {', '.join(known)}" if known else ""),
            found=repr(text),
            hint=did_you_mean(unknown[0], known or ()) if unknown else None,
        )
    return list(dict.fromkeys(parts))


def parse_numbers(text: str | None, option: str) -> list[int] | None:
    """Read `1,8` as positive numbers; None where nothing was given.

    Raises:
        InputError: A part is none.
    """
    if text is None:
        return None
    parts = parse_list(text, option)
    for part in parts:
        if not (part.isascii() and part.isdigit() and int(part) > 0):
            raise InputError("bad number", where=option, expected="such as 1,2", found=repr(part))
    return [int(part) for part in parts]


def parse_options(texts: list[str], option: str) -> dict[str, Any]:
    """Read `name=value` pairs; a value is a number, true, false or none where it reads as one, else text.

    Args:
        texts: What the user gave.
        option: Name of the option, for the message.

    Raises:
        InputError: A pair has no sign or no name.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not (name and sign and value):
            raise InputError("bad option", where=option, expected="NAME=VALUE", found=repr(text))
        options[name.replace("-", "_")] = _read_value(value)
    return options


def _read_value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_threads(text: str | None) -> list[int | None]:
    """Read `1,2` as numbers of threads; None, all CPUs, where nothing was given.

    Raises:
        InputError: A part is no positive integer.
    """
    numbers = parse_numbers(text, "--threads")
    return [None] if numbers is None else [*numbers]
