"""`nas compile`: one model, from a run, a graph or a space, to an artifact or another format."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir.errors import InputError
from nas.cli import device as device_options
from nas.cli.compile_matrix import show_matrix
from nas.cli.options import (
    Json,
    ModelOrNone,
    Pick,
    TargetName,
    Threads,
    TrialNumber,
    TuningDir,
    parse_list,
    parse_numbers,
)
from nas.cli.output import console, output, program, tell

if TYPE_CHECKING:
    from codegen.artifact import Artifact
    from nas.cli.models import Model as FoundModel
    from nas.devices import Timer


def compile_model(
    model: ModelOrNone = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="What to write; NAME.nas by default.")] = None,
    target: TargetName = "cpu",
    format: Annotated[
        str, typer.Option("--format", help="What to write: nas, an artifact; onnx; c, a folder without a runtime.")
    ] = "nas",
    step: Annotated[
        bool, typer.Option("--step", help="Write the function for one token and the state before it too.")
    ] = False,
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
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Write the function for a sequence and the state before it, too.")
    ] = False,
    batch: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Sequences in one call; a function for each number.")
    ] = None,
    seq_len: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Tokens in a sequence; a function for each number.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure the latency and record it in the artifact.")] = True,
    device: device_options.Address = None,
    secret_file: device_options.SecretFile = None,
    tls_ca: device_options.TlsCa = None,
    tls_fingerprint: device_options.TlsFingerprint = None,
    device_wait: device_options.Wait = device_options.DEFAULT_WAIT_S,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Write every published architecture, or those named, in every way instead.")
    ] = False,
    targets: Annotated[str | None, typer.Option(help="Targets of the matrix, with commas between them.")] = None,
    formats: Annotated[str | None, typer.Option(help="Formats of the matrix, with commas between them.")] = None,
    cell_timeout: Annotated[float, typer.Option(min=1.0, help="Seconds for one cell of the matrix.")] = 1200.0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Rows of the matrix side by side; usually one for each CPU.")
    ] = None,
    json: Json = False,
) -> None:
    """Compile a model, verify it against torch, and write it to a .nas file or in another format.

    A trial and an artifact keep their trained weights; a graph and an architecture of a space get fresh ones.
    """
    from nas.api import compile as compile_to_artifact
    from nas.cli.models import find_model
    from nas.devices import timer_of, use_device

    if matrix:
        show_matrix(
            model,
            parse_list(targets, "--targets") if targets else None,
            parse_list(formats, "--formats") if formats else None,
            cell_timeout,
            jobs,
            json,
        )
        return
    _refuse_matrix_options(targets, formats, jobs)
    if model is None:
        raise InputError("which model?", where="MODEL", expected="a run, an artifact, a graph or a space", found="none")
    if opt_level not in (1, 3):
        raise InputError("no such level", where="-O", expected="-O1 or -O3", found=f"-O{opt_level}")
    if format != "nas":
        tuned = opt_level == 3 or tuning_trials is not None
        _refuse_artifact_options(format, measured=device is not None, tuned=tuned, prefill=prefill)
        shape = {"batch": _one(batch, "--batch", format), "seq_len": _one(seq_len, "--seq-len", format)}
        code = {"target": target, "threads": threads, "strassen": strassen, "precision": precision}
        _export(find_model(model, trial=trial, pick=pick), out, format, json, step=step, **shape, **code)
        return
    with output(json) as stream:
        measured_on = device_options.find_device(device, secret_file, tls_ca, tls_fingerprint, device_wait)
        measured_on, compiled_for = use_device(measured_on, target, threads)
        found = find_model(model, trial=trial, pick=pick)
        tell(f"compiling {found.title}" + ("" if found.is_trained else "; its weights are not trained"))
        path = out if out is not None else Path(f"{found.name}.nas")
        _check_folder(path)
        artifact = compile_to_artifact(
            found.model,
            target=compiled_for,
            task=found.task,
            threads=threads,
            precision=precision,
            strassen=strassen,
            opt_level=3 if tuning_trials else opt_level,
            tuning_trials=tuning_trials,
            tuning_dir=tuning_dir,
            batch=parse_numbers(batch, "--batch"),
            seq_len=parse_numbers(seq_len, "--seq-len"),
            step=step,
            prefill=prefill,
            progress=_show_tuning,
        )
        artifact.save(path)
        latency = None
        if measure and (_runs_here(artifact) or measured_on is not None):
            latency = _measure(path, artifact.threads, timer_of(measured_on))
        facts = _facts(path, artifact, latency)
        if stream.json:
            stream.data(facts)
        else:
            stream.text(*_describe(facts))


def _one(text: str | None, option: str, format: str) -> int | None:
    """Return the number of an option that names one."""
    numbers = parse_numbers(text, option)
    if numbers and len(numbers) > 1:
        raise InputError("this format holds one size", where=option, expected="one number", found=f"{text}, {format}")
    return numbers[0] if numbers else None


def _refuse_matrix_options(*given: object) -> None:
    if any(given):
        raise InputError(
            "only the matrix has rows and columns",
            where="--targets, --formats, --jobs",
            expected="--matrix",
            found="none",
        )


def _refuse_artifact_options(format: str, *, measured: bool, tuned: bool, prefill: bool) -> None:
    """Refuse options that only the artifact's format serves."""
    refusals = [
        (measured, "only artifacts are measured", "--device"),
        (tuned, "only artifacts are tuned", "-O3"),
        (prefill, "this format holds no prefill", "--prefill"),
    ]
    for asked, message, option in refusals:
        if asked:
            raise InputError(message, where=option, expected="--format nas", found=f"--format {format}")


def _runs_here(artifact: Artifact) -> bool:
    elsewhere = "gpu" in artifact.target and (artifact.unverified or artifact.target["gpu"]["kind"] != "cuda")
    return artifact.target["architecture"] == platform.machine() and not elsewhere


def _facts(path: Path, artifact: Artifact, latency: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "artifact": str(path),
        "target": artifact.target["fingerprint"],
        "threads": artifact.threads,
        "functions": list(artifact.functions),
        "hash": artifact.graph_hash,
        "verification_error": artifact.verification_error,
        "unverified": artifact.unverified,
        "runs_here": _runs_here(artifact),
        "bytes": path.stat().st_size,
        "memory": dict(artifact.memory),
        "latency": latency,
    }


def _export(found: FoundModel, out: Path | None, format: str, json: bool, **options: Any) -> None:
    """Write a model in a format that is not the artifact's."""
    from codegen import formats
    from nas.api import export

    suffix = formats.get(format).SUFFIX
    path = out if out is not None else Path(f"{found.name}{suffix}")
    if suffix:
        _check_folder(path)
    with output(json) as stream:
        tell(f"writing {found.title}" + ("" if found.is_trained else "; its weights are not trained"))
        exported = export(found.model, path, format=format, task=found.task, **options)
        if stream.json:
            stream.data({"format": format, **exported.to_dict()})
            return
        error = exported.verification_error
        stream.text(
            f"{path}: {exported.size_bytes / 1e6:.2f} MB of {format}",
            *(f"  and {file}" for file in exported.files[1:] if suffix),
            f"  not run: {exported.unverified}"
            if error is None
            else f"  it and torch differ by {error:.1e} of the output's scale",
        )


def _check_folder(path: Path) -> None:
    """Refuse before the work what could not be written after it."""
    if path.is_dir():
        raise InputError(
            "the artifact must be a file", where="-o", expected="such as model.nas", found=f"{path}, a folder"
        )


def _measure(path: Path, threads: int, timer: Timer) -> dict[str, Any]:
    from codegen.artifact import record_latency

    tell("measuring")
    latency = timer.measure_latency(path, threads=threads).to_dict()
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
        f"  not run: {facts['unverified']}"
        if facts["unverified"]
        else f"  compiled and torch differ by {facts['verification_error']:.1e} of the output's scale",
    ]
    if memory := facts["memory"]:
        weights, activations = (memory[key] / 1e6 for key in ("weight_bytes", "activation_bytes"))
        lines.append(f"  {weights:.2f} MB of weights, {activations:.2f} MB of activations")
    if latency := facts["latency"]:
        low, high = latency["interval_ms"]
        noisy = "; the machine was not quiet" if latency["noisy"] else ""
        noisy += f"; on {latency['machine']['device']}" if "device" in latency["machine"] else ""
        lines.append(
            f"  {latency['median_ms']:.4g} ms a call, median in [{low:.4g}, {high:.4g}], "
            f"{latency['threads']} thread(s){noisy}"
        )
    if not facts["runs_here"]:
        return lines
    return [*lines, "Next:", f"  {program()} bench {facts['artifact']} --against eager,compile"]
