"""The table of a bench in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from nas.bench.record import Row, summary

_TITLES: Final = {
    "eager": "torch",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def to_markdown(rows: Sequence[Row]) -> str:
    """Write the rows as a table with machine, date and versions above and reasons for gaps below.

    Args:
        rows: Rows of one suite, in order.
    """
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    heads = ["model", "type", "threads", "nas ms", *(f"{_TITLES.get(name, name)} ms" for name in peers)]
    heads += ["times best", "GFLOP/s", "of peak", "error"]
    align = ["---", "---", *["---:"] * (len(heads) - 2)]
    lines = [_line(heads), "|" + "|".join(align) + "|", *(_line(_cells(row, peers)) for row in rows)]
    return "\n\n".join(part for part in (_head(rows), "\n".join(lines), _notes(rows)) if part)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, peers: Sequence[str]) -> list[str]:
    first = [str(row["model"]), str(row["dtype"]), str(row["threads"])]
    if row["status"] != "ok":
        return [*first, row["status"], *["-"] * (len(peers) + 4)]
    times = [_ms(row["peers"].get(name)) for name in peers]
    times = [f"**{text}**" if name == row["best_peer"] else text for name, text in zip(peers, times, strict=True)]
    ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
    share = f"{100 * row['peak_fraction']:.0f} %"
    return [*first, _ms(row["ours_ms"]), *times, ratio, f"{row['gflops']:.1f}", share, f"{row['max_error']:.0e}"]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _head(rows: Sequence[Row]) -> str:
    machine: dict[str, Any] = rows[-1].get("machine") or {}
    versions = (machine.get("versions") or {}) | (machine.get("peer_versions") or {})
    software = ", ".join(
        f"{title} {versions[key]}"
        for key, title in (("torch", "torch"), ("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO"))
        if versions.get(key)
    )
    peak, copied = (max(row.get(key) or 0.0 for row in rows) for key in ("fma_peak_gflops", "copy_gbs"))
    dates = sorted({row["measured"][:10] for row in rows})
    date = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    isa = f", everyone limited to {rows[-1]['isa'].upper()}" if rows[-1].get("isa") else ""
    total = summary(rows)
    text = (
        f"{date}, {machine.get('cpu', 'unknown processor')}, {machine.get('logical_cpus', '?')} CPUs{isa}; "
        f"multiply-add peak {peak:.0f} GFLOP/s, copy {copied:.0f} GB/s; {software}."
    )
    if total["compared"]:
        text += (
            f" Geometric mean of the ratios to the best peer (bold): {total['geometric_mean']:.2f}; "
            f"least {total['least']:.2f} ({total['least_row']})."
        )
    return text


def _notes(rows: Sequence[Row]) -> str:
    """Say once why a time is missing, for each peer and reason."""
    gaps: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reason = str(row.get("reason", "")).splitlines()
            gaps.setdefault(("nas", reason[0] if reason else row["status"]), []).append(row["model"])
        for name, reason in (row.get("missing") or {}).items():
            gaps.setdefault((name, reason), []).append(row["model"])
    lines = [
        f"- {_TITLES.get(name, name)}, {', '.join(dict.fromkeys(models))}: {reason.replace('|', '/')}"
        for (name, reason), models in gaps.items()
    ]
    return "\n".join(["No time:", "", *lines]) if lines else ""
