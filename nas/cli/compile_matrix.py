"""`nas compile --matrix`: every published architecture for every target and in every format, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from nas.cli.output import output, tell

if TYPE_CHECKING:
    from nas.matrix import Cell, Column


def show_matrix(
    model: str | None,
    targets: list[str] | None,
    formats: list[str] | None,
    limit_s: float,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Fill the matrix, a line for each row as it ends; exit code 1 where a cell failed.

    Args:
        model: Comma-separated names of architectures; all where None.
        targets: Targets; see `nas.matrix.columns`.
        formats: Formats.
        limit_s: Time for one cell.
        jobs: Rows side by side; as many as suit this machine where None.
        as_json: Whether to print JSON instead.
    """
    from nas import matrix

    with output(as_json) as stream:
        names, columns = matrix.models(model), matrix.columns(targets, formats)
        for column in columns:
            if column.unavailable:
                stream.text(f"{column.name}: not available: {column.unavailable}")
        width = max(map(len, names))
        cells: list[Cell] = []
        for name, row in matrix.fill(names, columns, limit_s=limit_s, jobs=jobs or matrix.usual_jobs()):
            cells += row
            stream.text(f"{name:<{width}}  " + "  ".join(f"{cell.column} {cell}" for cell in row))
        if as_json:
            stream.data(_data(columns, cells))
        stream.text(*_totals(columns, cells))
    failed = sum(cell.status == "fail" for cell in cells)
    if failed:
        tell(f"{failed} of {len(cells)} cells failed")
        raise typer.Exit(1)


def _data(columns: list[Column], cells: list[Cell]) -> dict[str, Any]:
    return {
        "columns": [vars(column) for column in columns],
        "passed": sum(cell.status == "pass" for cell in cells),
        "of": len(cells),
        "cells": [cell.to_dict() for cell in cells],
    }


def _totals(columns: list[Column], cells: list[Cell]) -> list[str]:
    lines: list[str] = []
    for column in columns:
        own = [cell for cell in cells if cell.column == column.name]
        if column.unavailable:
            lines.append(f"{column.name}: not available here")
            continue
        worst = max((cell.error for cell in own if cell.error is not None), default=None)
        run = "none was run" if worst is None else f"at most {worst:.1e} from torch"
        lines.append(f"{column.name}: {sum(cell.status == 'pass' for cell in own)} of {len(own)} pass, {run}")
    return lines
