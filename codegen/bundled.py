"""The program of a bundle: `python run.py check|bench|run|serve`. Needs numpy, and what the bundle holds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codegen import machine, measure, runtime
from codegen.devices import serve
from ir.errors import InputError, NasError


def main(folder: Path, arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says.

    Args:
        folder: The bundle.
        arguments: Of the command line; those of the process where None.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["serve"]:
        return serve.main(given[1:], "run.py serve")
    options = _parser().parse_args(given)
    try:
        options.verb(options, _chosen(folder, options.artifact))
    except NasError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="Run compiled models with Python and numpy alone.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    check = verbs.add_parser("check", help="check each artifact: checksums, processor, self-test")
    check.set_defaults(verb=_check)
    bench = verbs.add_parser("bench", help="time each artifact")
    bench.set_defaults(verb=_bench)
    bench.add_argument("--seconds", type=float, default=10.0, help="time for each [%(default)s]")
    bench.add_argument("--json", action="store_true", help="print the records")
    run = verbs.add_parser("run", help="run an artifact on arrays of .npy files")
    run.set_defaults(verb=_run)
    run.add_argument("--input", action="append", default=[], metavar="NAME=FILE", help="an input; repeat it")
    run.add_argument("--out", default="outputs.npz", help="file for the outputs [%(default)s]")
    verbs.add_parser("serve", help="offer this machine for measuring; `run.py serve --help` lists the options")
    for parser_of_one in (bench, run):
        parser_of_one.add_argument("--threads", type=int, help="threads; all CPUs when omitted")
    for parser_of_one in (check, bench, run):
        parser_of_one.add_argument("artifact", nargs="*", help="names or files; all of the bundle when omitted")
    return parser


def _chosen(folder: Path, names: Sequence[str]) -> list[Path]:
    own = sorted((folder / "artifacts").glob("*.nas"))
    if not names:
        return own
    known = {path.name: path for path in own} | {path.stem: path for path in own}
    return [known.get(name, Path(name)) for name in names]


def _check(_options: argparse.Namespace, paths: Sequence[Path]) -> None:
    for path in paths:
        report = runtime.verify(path)
        print(f"{path.name}: whole, and runs here", *(f"  {line}" for line in report.checks), sep="\n")


def _bench(options: argparse.Namespace, paths: Sequence[Path]) -> None:
    found = {
        path.name: measure.measure_latency(path, threads=options.threads, max_seconds=options.seconds) for path in paths
    }
    if options.json:
        print(json.dumps({name: latency.to_dict() for name, latency in found.items()}, indent=1))
        return
    for name, latency in found.items():
        low, high = latency.interval_ms
        noisy = "; the machine was not quiet" if latency.noisy else ""
        print(
            f"{name}: {latency.median_ms:.4g} ms a call, median in [{low:.4g}, {high:.4g}], "
            f"{latency.threads} thread(s){noisy}"
        )


def _run(options: argparse.Namespace, paths: Sequence[Path]) -> None:
    if len(paths) != 1:
        raise InputError("run takes one artifact", expected="its name", found=f"{len(paths)} of them")
    model = runtime.load(paths[0], threads=options.threads or len(machine.available_cpus()))
    inputs = model.example_inputs()
    for text in options.input:
        name, sign, file = text.partition("=")
        if not sign:
            raise InputError("bad input", where="--input", expected="NAME=FILE", found=text)
        try:
            inputs[name] = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError("cannot read an input", where=file, found=str(error)) from error
    if not options.input:
        print("no --input: running on the inputs of the self-test")
    outcome = model(**inputs)
    results: dict[str, Any] = outcome if isinstance(outcome, dict) else {model.outputs[0].name: outcome}
    np.savez(options.out, **results)
    print(*(f"{name}: {array.dtype}{list(array.shape)}" for name, array in results.items()), sep="\n")
    print(f"written to {options.out}")
