"""`nas compile`: one model, from a run, a graph or a space, to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ir.errors import InputError
from nas.cli.options import Json, Model, Pick, TargetName, Threads, TrialNumber, TuningDir
from nas.cli.output import console, output, program, tell


def compile_model(
    model: Model,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Artifact to write; NAME.nas by default.")] = None,
    target: TargetName = "cpu",
    trial: TrialNumber = None,
    pick: Pick = "centroid",
    precision: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16", help="What the operands of products are rounded to.")
    ] = None,
    strassen: Annotated[
        bool, typer.Option(help="Run large products as seven half ones; off for rows of very different size.")
    ] = True,
    opt_level: Annotated[int, typer.Option("-O", metavar="1|3", help="-O1 compiles, -O3 tunes kernels first.")] = 1,
    tuning_trials: Annotated[
        int | None, typer.Option(min=1, help="Kernel candidates that -O3 measures; implies -O3.")
    ] = None,
    tuning_dir: TuningDir = None,
    threads: Threads = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences in one call.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence.")] = None,
    measure: Annotated[bool, typer.Option(help="Measure the latency and record it in the artifact.")] = True,
    json: Json = False,
) -> None:
    """Compile a model, verify it against torch, and write it to a .nas file.

    A trial and an artifact keep their trained weights; a graph and an architecture of a space get fresh ones.
    """
    from nas.api import compile as compile_to_artifact
    from nas.cli.models import find_model

    if opt_level not in (1, 3):
        raise InputError("no such level", where="-O", expected="-O1 or -O3", found=f"-O{opt_level}")
    with output(json) as stream:
        found = find_model(model, trial=trial, pick=pick)
        tell(f"compiling {found.title}" + ("" if found.is_trained else "; its weights are not trained"))
        path = out if out is not None else Path(f"{found.name}.nas")
        _check_folder(path)
        artifact = compile_to_artifact(
            found.model,
            target=target,
            task=found.task,
            threads=threads,
            precision=precision,
            strassen=strassen,
            opt_level=3 if tuning_trials else opt_level,
            tuning_trials=tuning_trials,
            tuning_dir=tuning_dir,
            batch=batch,
            seq_len=seq_len,
            progress=_show_tuning,
        )
        artifact.save(path)
        latency = _measure(path, artifact.threads) if measure else None
        facts: dict[str, Any] = {
            "artifact": str(path),
            "target": artifact.target["fingerprint"],
            "threads": artifact.threads,
            "hash": artifact.graph_hash,
            "verification_error": artifact.verification_error,
            "bytes": path.stat().st_size,
            "memory": dict(artifact.memory),
            "latency": latency,
        }
        if stream.json:
            stream.data(facts)
            return
        stream.text(*_describe(facts))


def _check_folder(path: Path) -> None:
    """Refuse before the work what could not be written after it."""
    if path.is_dir():
        raise InputError(
            "the artifact must be a file", where="-o", expected="such as model.nas", found=f"{path}, a folder"
        )


def _measure(path: Path, threads: int) -> dict[str, Any]:
    from codegen.artifact import record_latency
    from codegen.measure import measure_latency

    tell("measuring")
    latency = measure_latency(path, threads=threads).to_dict()
    record_latency(path, latency)
    return latency


def _show_tuning(done: int, total: int, what: str) -> None:
    screen = console(stderr=True)
    if screen.is_terminal:
        screen.print(
            f"tuning {done}/{total}: {what}"[: screen.width - 1].ljust(screen.width - 1), end="\r", markup=False
        )
    elif done % 10 == 0:
        tell(f"tuning {done}/{total}: {what}")


def _describe(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"{facts['artifact']}: {facts['bytes'] / 1e6:.2f} MB for {facts['target']}",
        f"  compiled and torch differ by {facts['verification_error']:.1e} of the output's scale",
    ]
    if memory := facts["memory"]:
        weights, activations = (memory[key] / 1e6 for key in ("weight_bytes", "activation_bytes"))
        lines.append(f"  {weights:.2f} MB of weights, {activations:.2f} MB of activations")
    if latency := facts["latency"]:
        low, high = latency["interval_ms"]
        noisy = "; the machine was not quiet" if latency["noisy"] else ""
        lines.append(
            f"  {latency['median_ms']:.4g} ms a call, median in [{low:.4g}, {high:.4g}], "
            f"{latency['threads']} thread(s){noisy}"
        )
    return [*lines, "Next:", f"  {program()} bench {facts['artifact']} --against eager,compile"]
