"""Write the report of a study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ir.errors import InputError, StorageError
from nas.report.contents import Contents
from nas.report.figures import Drawing, draw_front, draw_history
from nas.report.page import render_page
from nas.study import Study

PAGE_NAME = "report.html"


@dataclass(frozen=True)
class Written:
    """Files of a report.

    Attributes:
        page: The HTML page; it needs no other file.
        figures: The same figures as PNG files.
    """

    page: Path
    figures: tuple[Path, ...]


def write_report(study: Study, folder: str | Path | None = None) -> Written:
    """Write a study's report.

    Args:
        study: A study; `nas.load_study` opens one for reading.
        folder: Where to; the folder `report` of the run where None.

    Returns:
        The files.

    Raises:
        InputError: The study has no run folder and no other is given.
        StorageError: A file cannot be written.
    """
    if folder is None and study.folder is None:
        raise InputError("a study without a run folder has no place for a report", expected="folder=...")
    target = Path(folder) if folder is not None else Path(str(study.folder)) / "report"
    contents = Contents.of(study)
    drawings = draw_all(contents)
    page = render_page(contents, drawings)
    try:
        target.mkdir(parents=True, exist_ok=True)
        figures = tuple(target / f"{drawing.name}.png" for drawing in drawings)
        for path, drawing in zip(figures, drawings, strict=True):
            path.write_bytes(drawing.png)
        (target / PAGE_NAME).write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            "the report cannot be written",
            where=str(error.filename or target),
            found=error.strerror or str(error),
            hint="make room or fix the permissions, or give another folder with --out",
        ) from error
    return Written(target / PAGE_NAME, figures)


def draw_all(contents: Contents) -> list[Drawing]:
    """Draw the front, once for each objective besides the first, and the course of the search."""
    objectives = contents.study.goals.objectives
    fronts = [draw_front(contents, objectives[0], other) for other in objectives[1:]]
    return [drawing for drawing in (*fronts, draw_history(contents)) if drawing is not None]
