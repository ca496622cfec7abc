"""Read a numeric series from a CSV file, naming the line of whatever is wrong."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ir.errors import DataError
from nas.tasks.base import find_data

Rows = Iterator[tuple[int, list[str]]]


@dataclass(frozen=True)
class Header:
    """Columns of a CSV file.

    Attributes:
        variates: Names of the numeric columns.
        dated: Whether a first column of dates stands before them.
    """

    variates: tuple[str, ...]
    dated: bool


@lru_cache(maxsize=8)
def read_header(data: str) -> Header:
    """Read the columns of a CSV file, without its data.

    Args:
        data: Path as the user wrote it.

    Returns:
        The columns.

    Raises:
        DataError: No header, no data row, no numeric column, or a name that is empty or repeated.
    """
    with _open_rows(data) as rows:
        return _read_header(data, rows)[0]


def read_series(data: str) -> npt.NDArray[np.float64]:
    """Read all numeric columns of a CSV file.

    Args:
        data: Path as the user wrote it.

    Returns:
        Float64 `[rows, variates]`.

    Raises:
        DataError: As `read_header`; or a row of another length, a cell that is no number, NaN or infinite.
    """
    with _open_rows(data) as rows:
        header, first = _read_header(data, rows)
        values = [_parse_row(data, header, *first)]
        values.extend(_parse_row(data, header, line, cells) for line, cells in rows)
    return np.array(values)


@contextmanager
def _open_rows(data: str) -> Iterator[Rows]:
    """Rows that are not blank, with their line numbers; every way of being unreadable is a DataError."""
    path = find_data("forecast", data, folder_allowed=False)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            yield ((reader.line_num, cells) for cells in reader if cells)
        except UnicodeDecodeError as error:
            raise DataError("the file is not text", where=data, expected="CSV in UTF-8", found=str(error)) from error
        except csv.Error as error:
            where = f"{data}:{reader.line_num}"
            raise DataError(
                "the file is not CSV", where=where, expected="comma-separated values", found=str(error)
            ) from error


def _read_header(data: str, rows: Rows) -> tuple[Header, tuple[int, list[str]]]:
    header_line, names = next(rows, (1, []))
    first = next(rows, None)
    if first is None:
        found = "an empty file" if not names else "a header alone"
        raise DataError("no data", where=data, expected="a header and rows of numbers", found=found)
    names = [name.strip() for name in names]
    _check_names(data, header_line, names)
    dated = _number(first[1][0]) is None
    variates = tuple(names[1:] if dated else names)
    if not variates:
        raise DataError(
            "no numeric column",
            where=f"{data}:{first[0]}",
            expected="numbers separated by commas, after at most one column of dates",
            found=repr(",".join(first[1])),
            hint="columns must be separated by commas, not by semicolons or tabs",
        )
    return Header(variates, dated), first


def _check_names(data: str, line: int, names: list[str]) -> None:
    where = f"{data}:{line}"
    if all(_number(name) is not None for name in names):
        raise DataError("no header", where=where, expected="column names", found=repr(",".join(names)))
    for column, name in enumerate(names, start=1):
        if not name:
            raise DataError("a column has no name", where=where, expected="a name", found=f"nothing in column {column}")
        if names.index(name) != column - 1:
            raise DataError("two columns have one name", where=where, expected="distinct names", found=repr(name))


def _parse_row(data: str, header: Header, line: int, cells: list[str]) -> list[float]:
    names = (("date",) if header.dated else ()) + header.variates
    if len(cells) != len(names):
        raise DataError(
            "a row is of another length than the header",
            where=f"{data}:{line}",
            expected=f"{len(names)} cells",
            found=f"{len(cells)} cells",
        )
    numeric = cells[1:] if header.dated else cells
    return [_parse_cell(f"{data}:{line}", *cell) for cell in zip(header.variates, numeric, strict=True)]


def _parse_cell(where: str, column: str, text: str) -> float:
    number = _number(text)
    if number is None or not math.isfinite(number):
        problem = "a cell is not a number" if number is None else "a value is not finite"
        raise DataError(
            problem,
            where=where,
            expected=f"a finite number in column {column!r}",
            found=repr(text) if text.strip() else "an empty cell",
            hint="fill or drop missing values first",
        )
    return number


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
