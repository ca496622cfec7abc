"""Tables in documents: between two comments, written by a command and never by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ir.errors import InputError, StorageError


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """Write a table in Markdown.

    Args:
        heads: Titles of the columns.
        rows: Cells.
        right: Titles of columns aligned to the right.
    """
    align = ["---:" if head in right else "---" for head in heads]
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(align)}|", *lines[1:]])


def write_into(path: Path, mark: str, text: str) -> None:
    """Put text between the comments `mark:begin` and `mark:end` of a document, in place of what is there.

    Raises:
        InputError: The document cannot be read, or has not each comment once, in order.
        StorageError: It cannot be written.
    """
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    try:
        whole = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError("cannot read the document", where=str(path), found=error.strerror) from error
    head, opening, rest = whole.partition(begin)
    _, closing, tail = rest.partition(end)
    if not (opening and closing) or whole.count(begin) != 1 or whole.count(end) != 1:
        raise InputError("the document has no place for the table", where=str(path), expected=f"{begin} ... {end}")
    try:
        path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
    except OSError as error:
        raise StorageError("cannot write the document", where=str(path), found=error.strerror) from error
