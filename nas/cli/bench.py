"""`nas bench`: a compiled model, a suite of models or the kernels timed beside torch and other runtimes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir.errors import InputError
from nas.cli import bench_suite
from nas.cli import device as device_options
from nas.cli.options import Json, Pick, TrialNumber, parse_list, parse_threads
from nas.cli.output import Output, make_table, output, tell

if TYPE_CHECKING:
    from codegen.devices.client import Device
    from nas.study import Study

_MODEL_SECONDS = 120.0


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A run folder, an artifact (.nas), a graph (.json, .txt), or a search space (a YAML file or a name)."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="eager, compile (both torch), onnxruntime, openvino; with commas between them. eager,compile when "
            "omitted, all of them for a suite."
        ),
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="Such as 1,2; all CPUs when omitted, and one CPU as well for a suite.")
    ] = None,
    trial: TrialNumber = None,
    pick: Pick = "centroid",
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="Time for the rounds of one comparison: 120, 10 in a suite, 2 for a kernel."),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Time the models of a suite, such as cpu.")] = None,
    models: Annotated[str | None, typer.Option(help="With --suite: which, such as 'encoder-*,vit-tiny'.")] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Time single kernels, family by family.")] = False,
    families: Annotated[str | None, typer.Option(help="With --kernels: which, such as gemm,attention.")] = None,
    isa: Annotated[
        str | None, typer.Option(help="Keep everyone to this instruction set: avx2. For suites and kernels.")
    ] = None,
    prepare_seconds: Annotated[
        float, typer.Option(min=1.0, help="With --suite: longest preparation of one peer for one model.")
    ] = 180.0,
    out: Annotated[
        Path | None, typer.Option("--out", help="With --suite: append each row to this file as soon as it is there.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Do not repeat rows that the same code measured into --out here.")
    ] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="With --suite: show the rows of this file, measure nothing.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of a suite in Markdown.")] = False,
    into: Annotated[Path | None, typer.Option(help="Put that table between the bench marks of this document.")] = None,
    device: device_options.Address = None,
    secret_file: device_options.SecretFile = None,
    tls_ca: device_options.TlsCa = None,
    tls_fingerprint: device_options.TlsFingerprint = None,
    device_wait: device_options.Wait = device_options.DEFAULT_WAIT_S,
    json: Json = False,
) -> None:
    """Time a compiled model beside other runtimes: same graph, weights, inputs and threads, in turns in one process.

    A run is timed artifact by artifact, and the results are kept for its report. There are no figures where outputs
    disagree. `--suite` does so for fixed models, `--kernels` for single kernels. A device has no other runtimes: with
    `--device` the model alone is timed.
    """
    from codegen.peers import PEERS
    from nas.cli.models import is_artifact, is_run, open_run

    _check_one_subject(model, suite, kernels)
    if device is not None and model is None:
        raise InputError("a device times models", where="--device", expected="a model", found="a suite or kernels")
    with output(json) as out_put:
        counts = parse_threads(threads)
        if kernels:
            bench_suite.bench_kernels(families, counts, isa, seconds, out_put)
            return
        if suite is not None:
            peers = parse_list(against, "--against", tuple(PEERS)) if against else list(PEERS)
            chosen = counts if threads else None
            wanted = bench_suite.Wanted(suite, models, chosen, peers, isa, seconds, prepare_seconds)
            bench_suite.bench_suite(wanted, bench_suite.Files(out, resume, source, into), markdown, out_put)
            return
        assert model is not None
        limit_s = _MODEL_SECONDS if seconds is None else seconds
        measured_on = device_options.find_device(device, secret_file, tls_ca, tls_fingerprint, device_wait)
        if measured_on is not None:
            if against:
                raise InputError("a device has no other runtimes", where="--against", found="--device besides")
            _show(_bench_on(measured_on, model, counts, trial, pick, limit_s), out_put)
            return
        peers = parse_list(against or "eager,compile", "--against", tuple(PEERS))
        if is_run(model):
            results = bench_run(open_run(model), peers, counts, trial=trial, seconds=limit_s, tell=tell)
        elif is_artifact(model):
            if trial is not None:
                raise InputError("only a run has trials", where="--trial", expected="a run folder", found=model)
            results = _bench_file(Path(model), peers, counts, limit_s, tell)
        else:
            results = _bench_unsaved(model, peers, counts, pick, limit_s)
        _show(results, out_put)


def _check_one_subject(model: str | None, suite: str | None, kernels: bool) -> None:
    named = [text for text in (model, suite and f"--suite {suite}", "--kernels" if kernels else None) if text]
    if len(named) != 1:
        raise InputError(
            "bench times one thing",
            expected="a model, or --suite, or --kernels",
            found=" and ".join(named) or "none of them",
            hint="nas bench best.nas, nas bench --suite cpu, nas bench --kernels",
        )


def bench_run(
    study: Study,
    peers: Sequence[str],
    threads: Sequence[int | None],
    *,
    trial: int | None = None,
    seconds: float = 120.0,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Time the artifacts of a run and keep the results in its folder.

    Args:
        study: A study with a run folder.
        peers: Whom to time them beside.
        threads: Numbers of threads; None is all CPUs.
        trial: The one trial to time; the whole front where None.
        seconds: Longest time for the rounds of one comparison.
        tell: Hears what is timed.

    Raises:
        InputError: There is no artifact.
        StorageError: The results cannot be written.
    """
    from nas.bench_results import keep_result

    results: list[dict[str, Any]] = []
    for number, path in _artifacts(study, trial).items():
        for result in _bench_file(path, peers, threads, seconds, tell):
            results.append({"trial": number} | result)
            keep_result(Path(str(study.folder)), results[-1])
    return results


def _artifacts(study: Study, trial: int | None) -> dict[int, Path]:
    """Return the artifact of a trial, or of each point of the front.

    Raises:
        InputError: There is none.
    """
    from nas.summary import artifact_path

    chosen = study.pareto_front() if trial is None else [item for item in study.trials if item.number == trial]
    paths = {item.number: path for item in chosen if (path := artifact_path(study, item)) is not None}
    if not paths:
        raise InputError(
            "there is no artifact to time",
            where=f"{study.folder}" if trial is None else f"trial {trial} of {study.folder}",
            hint="give the search command again to ship its front, or compile the trial with `nas compile`",
        )
    return paths


def _bench_on(
    device: Device, text: str, threads: Sequence[int | None], trial: int | None, pick: str, seconds: float
) -> list[dict[str, Any]]:
    """Time artifacts on a device, which are compiled for it where they are none yet."""
    from nas.api import compile as compile_model
    from nas.cli.models import find_model, is_artifact, is_run, open_run
    from nas.devices import bench_on, use_device

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nas-bench-") as folder, device.hold():
        for count in threads:
            about: dict[str, Any] = {}
            if is_run(text):
                paths = [({"trial": number}, path) for number, path in _artifacts(open_run(text), trial).items()]
            elif is_artifact(text):
                paths = [(about, Path(text))]
            else:
                found = find_model(text, pick=pick)
                tell(f"compiling {found.title}")
                _, target = use_device(device, "cpu", count)
                made = compile_model(found.model, task=found.task, target=target)
                about = {"artifact": None, "model": found.title}
                paths = [(about, made.save(Path(folder) / f"{found.name}.nas"))]
            for known, path in paths:
                tell(f"timing {path.name} on {device.address}")
                results.append(bench_on(device, path, count, seconds) | known)
    return results


def _bench_file(
    path: Path, peers: Sequence[str], threads: Sequence[int | None], seconds: float, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    from codegen import peers as runners

    results: list[dict[str, Any]] = []
    for count in threads:
        tell(f"timing {path} beside {', '.join(peers)}, {'all CPUs' if count is None else f'{count} thread(s)'}")
        results.append(runners.bench(path, peers, count, max_seconds=seconds))
    return results


def _bench_unsaved(
    text: str, peers: Sequence[str], threads: Sequence[int | None], pick: str, seconds: float
) -> list[dict[str, Any]]:
    """Compile a graph or an architecture for the time of the comparison."""
    from nas.api import compile as compile_model
    from nas.cli.models import find_model

    found = find_model(text, pick=pick)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nas-bench-") as folder:
        for count in threads:
            tell(f"compiling {found.title}")
            path = compile_model(found.model, task=found.task, threads=count).save(Path(folder) / f"{found.name}.nas")
            results += [
                result | {"artifact": None, "model": found.title}
                for result in _bench_file(path, peers, [count], seconds, tell)
            ]
    return results


def _show(results: list[dict[str, Any]], out: Output) -> None:
    for result in results:
        out.table(_table(result))
    missing = sorted(
        {
            f"{name}: {entry.get('reason', '')}"
            for result in results
            for name, entry in result["results"].items()
            if entry["status"] == "not installed"
        }
    )
    if missing:
        tell(*missing, "the other runtimes come with: pip install 'nas[bench]'")
    if out.json:
        out.data({"results": results})


def _table(result: dict[str, Any]) -> Any:
    which = f"trial {result['trial']}, " if "trial" in result else ""
    name = result["artifact"] or result.get("model", "")
    count = result["threads"]
    title = f"{which}{name}, {count} thread{'s' if count != 1 else ''}"
    right = ("median ms", "times nas")
    table = make_table("runtime", "median ms", "95 % interval", "times nas", "difference", title=title, right=right)
    for runtime, entry in result["results"].items():
        if entry["status"] != "ok":
            table.add_row(runtime, "-", "-", "-", f"{entry['status']}: {entry.get('reason', '')}")
            continue
        low, high = entry["interval_ms"]
        times = f"{entry['ratio']:.2f}" if runtime != "nas" else "1"
        table.add_row(
            runtime, f"{entry['median_ms']:.4g}", f"[{low:.4g}, {high:.4g}]", times, f"{entry['max_error']:.1e}"
        )
    return table
