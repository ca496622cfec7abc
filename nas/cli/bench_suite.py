"""What `nas bench --suite` and `nas bench --kernels` print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ir.errors import InputError, did_you_mean
from nas.cli.options import parse_list
from nas.cli.output import Output, make_table, tell

_SUITE_SECONDS, _KERNEL_SECONDS = 10.0, 2.0


@dataclass(frozen=True)
class Wanted:
    """The options of a suite's bench as they were given."""

    suite: str
    models: str | None
    threads: Sequence[int | None] | None
    peers: Sequence[str]
    isa: str | None
    seconds: float | None
    prepare_seconds: float


@dataclass(frozen=True)
class Files:
    """Where rows come from and go to.

    Attributes:
        out: File that keeps each row.
        resume: Whether rows of that file are taken over.
        source: File to show instead of measuring.
        into: Document whose table is replaced.
    """

    out: Path | None
    resume: bool
    source: Path | None
    into: Path | None


def bench_suite(wanted: Wanted, files: Files, markdown: bool, out_put: Output) -> None:
    """Time a suite, or show the rows of an earlier bench.

    Args:
        wanted: What to time.
        files: Where rows come from and go to.
        markdown: Whether the table is printed in Markdown.
        out_put: Where the results go.

    Raises:
        InputError: An option is wrong.
        Exit: A model computes something else than torch, or could not be timed; with status 1, after the results.
    """
    from nas.bench import record
    from nas.bench.markdown import to_markdown
    from nas.documents import write_into

    if files.resume and files.out is None:
        raise InputError("nothing to resume", where="--resume", expected="--out FILE", found="no --out")
    rows = _measure(wanted, files.out, files.resume) if files.source is None else _read(files.source, wanted)
    if files.into is not None:
        write_into(files.into, "bench", to_markdown(rows))
    if out_put.json:
        out_put.data(record.document(rows))
    elif markdown:
        out_put.text(to_markdown(rows))
    else:
        out_put.table(_suite_table(rows))
        out_put.text(*_suite_notes(rows))
    if any(row["status"] != "ok" for row in rows):
        raise typer.Exit(1)


def bench_kernels(
    families: str | None, threads: Sequence[int | None], isa: str | None, seconds: float | None, out_put: Output
) -> None:
    """Time kernels.

    Args:
        families: Which, with commas between them; all where None.
        threads: Numbers of threads; None is all CPUs.
        isa: Instruction set to keep to.
        seconds: Time for each kernel.
        out_put: Where the results go.

    Raises:
        InputError: An option is wrong.
        Exit: A kernel is wrong or failed; with status 1, after the results.
    """
    from codegen import machine
    from codegen.kernel_bench import bench_kernels as measure
    from codegen.kernel_cases import FAMILIES

    chosen = parse_list(families, "--families", FAMILIES) if families else []
    _check_isa(isa)
    rows: list[dict[str, Any]] = []
    for count in threads:
        number = len(machine.available_cpus()) if count is None else machine.check_threads(count)
        rows += measure(chosen, number, isa=isa, seconds=_KERNEL_SECONDS if seconds is None else seconds, tell=tell)
    if out_put.json:
        limits = {key: max((row[key] or 0.0 for row in rows), default=0.0) for key in ("fma_peak_gflops", "copy_gbs")}
        out_put.data({"machine": machine.describe(), **limits, "rows": rows})
    else:
        out_put.table(_kernel_table(rows))
        out_put.text(*_reasons(rows, "shape"))
    if any(row["status"] != "ok" for row in rows):
        raise typer.Exit(1)


def _measure(wanted: Wanted, out: Path | None, resume: bool) -> list[dict[str, Any]]:
    from codegen import machine
    from nas.bench import record
    from nas.bench.suite import SuiteBench

    _check_isa(wanted.isa)
    cpus = len(machine.available_cpus())
    counts = list(dict.fromkeys((1, cpus) if wanted.threads is None else (n or cpus for n in wanted.threads)))
    bench = SuiteBench(
        wanted.suite,
        parse_list(wanted.models, "--models") if wanted.models else (),
        counts,
        wanted.peers,
        wanted.isa,
        _SUITE_SECONDS if wanted.seconds is None else wanted.seconds,
        wanted.prepare_seconds,
    )
    done = record.read(out) if resume and out is not None and out.exists() and out.stat().st_size else []

    def keep(row: dict[str, Any]) -> None:
        if out is not None:
            record.append(out, row)
        tell(f"  {row['model']}, {row['threads']} thread(s): {_sentence(row)}")

    return bench.run(done=done, keep=keep, tell=tell)


def _read(source: Path, wanted: Wanted) -> list[dict[str, Any]]:
    from nas.bench import record

    rows = [row for row in record.read(source) if row.get("suite") == wanted.suite and row.get("isa") == wanted.isa]
    if not rows:
        which = f"suite {wanted.suite}" + (f" limited to {wanted.isa}" if wanted.isa else "")
        raise InputError("this file has no rows of this suite", where=str(source), expected=which)
    return rows


def _check_isa(isa: str | None) -> None:
    from nas.bench.suite import ISAS

    if isa is not None and isa not in ISAS:
        raise InputError(
            "no such limit", where="--isa", expected=", ".join(ISAS), found=isa, hint=did_you_mean(isa, ISAS)
        )


def _sentence(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row.get('reason', '')}"
    beside = f", {row['ratio']:.2f} times as fast as {row['best_peer']}" if row["ratio"] else ""
    return f"{row['ours_ms']:.4g} ms{beside}"


def _suite_table(rows: list[dict[str, Any]]) -> Any:
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    numbers = ("nas ms", "95 % interval", *peers, "times best", "by rounds", "GFLOP/s", "of peak", "GB/s", "of copy")
    table = make_table("model", "type", "threads", *numbers, "difference", right=("threads", *numbers))
    for row in rows:
        first = (row["model"], row["dtype"], str(row["threads"]))
        if row["status"] != "ok":
            table.add_row(*first, row["status"], *["-"] * (len(numbers)))
            continue
        low, high = row["intervals_ms"]["nas"]
        times = [_number(row["peers"].get(name)) for name in peers]
        ratios = (_number(row["ratio"], "{:.2f}"), _number(row["round_ratio"], "{:.2f}"))
        ours = (_number(row["ours_ms"]), f"[{low:.4g}, {high:.4g}]")
        table.add_row(*first, *ours, *times, *ratios, *_speeds(row), f"{row['max_error']:.1e}")
    return table


def _suite_notes(rows: list[dict[str, Any]]) -> list[str]:
    from nas.bench.record import summary

    total = summary(rows)
    lines = _reasons(rows, "model")
    gaps = {(name, reason) for row in rows for name, reason in (row.get("missing") or {}).items()}
    lines += [f"{name}: {reason}" for name, reason in sorted(gaps)]
    if total["compared"]:
        lines.append(
            f"geometric mean of the ratios to the best peer {total['geometric_mean']:.2f}, least {total['least']:.2f}: "
            f"{total['least_row']}"
        )
    return lines


def _kernel_table(rows: list[dict[str, Any]]) -> Any:
    numbers = ("ms", "95 % interval", "eager ms", "times eager", "GFLOP/s", "of peak", "GB/s", "of copy", "error")
    table = make_table("family", "shape", "threads", *numbers, right=("threads", *numbers))
    for row in rows:
        first = (row["family"], row["shape"], str(row["threads"]))
        if row["status"] != "ok":
            table.add_row(*first, row["status"], *["-"] * (len(numbers) - 1))
            continue
        low, high = row["interval_ms"]
        ours = (_number(row["ours_ms"]), f"[{low:.4g}, {high:.4g}]")
        eager = (_number(row["eager_ms"]), _number(row["ratio"], "{:.2f}"))
        table.add_row(*first, *ours, *eager, *_speeds(row), f"{row['max_error']:.1e}")
    return table


def _reasons(rows: list[dict[str, Any]], name: str) -> list[str]:
    return [f"{row[name]}, {row['threads']} thread(s): {_sentence(row)}" for row in rows if row["status"] != "ok"]


def _speeds(row: dict[str, Any]) -> tuple[str, ...]:
    return f"{row['gflops']:.1f}", _share(row["peak_fraction"]), f"{row['gbs']:.1f}", _share(row["copy_fraction"])


def _number(value: float | None, form: str = "{:.4g}") -> str:
    return "-" if value is None else form.format(value)


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
