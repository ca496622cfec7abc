"""Every published architecture compiled for every target and written in every format: what works, and why the rest not.

Cells are filled in worker processes with a time-out, so that a crash or a hang costs one cell. Several rows are filled
side by side, each on CPUs of its own.
"""

from __future__ import annotations

import os
import queue
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from codegen import machine
from codegen.workers import RemoteError, Worker
from ir.errors import InputError, NasError, TargetUnavailable, did_you_mean

if TYPE_CHECKING:
    from ir.graph import Graph

TARGETS: Final = ("cpu", "arm64", "cuda:sm_90", "metal", "opencl")
"""Columns of the matrix where no targets are named; one that is not to be had is said to be so."""
ARTIFACT: Final = "nas"
"""The format of the columns that are named after a target."""
CELL_LIMIT_S: Final = 1200.0
"""Time for one cell; under an emulator a model of long sequences takes minutes."""
_APART: Final = 0.02
"""Deviation of what is added to weights that start at nothing: a usual one of initial weights."""
_NOTHING: Final = 1e-4
"""Layer scales start at most here."""
_JOB_BYTES: Final = 18 << 30
"""Memory that a cell may take: 340 million weights for Arm, in several forms in several processes, took 17 GB."""
_LARGE_BYTES: Final = 256 << 20
"""Processes that have written more end, which gives their memory back."""
_ENVIRONMENT: Final = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""Variables of the processes: the C library gives the memory of an array of 1 MB or more back when it is freed."""
_POLL_S: Final = 0.05
_SHORT: Final = 200
"""Characters of a reason in a table."""


@dataclass(frozen=True)
class Column:
    """A way to write a model.

    Attributes:
        name: Heading.
        format: Key of the format.
        target: Target of a format that needs one.
        unavailable: Why nothing can be written this way here; empty where it can.
    """

    name: str
    format: str
    target: str | None
    unavailable: str = ""


@dataclass(frozen=True)
class Cell:
    """One model written one way.

    Attributes:
        model: Name of the published architecture.
        column: Name of the column.
        status: `pass`, `refused` by a format or a target that says it does not serve the model, or `fail`.
        reason: Why it did not pass; or why what passed was not run.
        error: Largest difference from torch relative to the output's scale, where it was run.
        size_bytes: Bytes written.
        seconds: Time it took, the start of a process included; wall clock.
    """

    model: str
    column: str
    status: str
    reason: str = ""
    error: float | None = None
    size_bytes: int | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.status != "pass":
            return f"{self.status}: {self.reason[:_SHORT]}"
        return "pass, not run" if self.error is None else f"pass {self.error:.0e}"


def columns(targets: Sequence[str] | None = None, formats: Sequence[str] | None = None) -> list[Column]:
    """Return a column for each target, as an artifact, and one for each other format.

    Args:
        targets: Names of targets; `TARGETS` and any further target of this installation where None.
        formats: Keys of formats; all where None. Without the artifact's among them no targets are columns.

    Raises:
        InputError: No such target or format.
    """
    from codegen import formats as known

    wanted = known.available() if formats is None else list(formats)
    for name in wanted:
        known.get(name)
    found = [_target_column(name) for name in _targets(targets)] if ARTIFACT in wanted else []
    for name in wanted:
        if name != ARTIFACT:
            found.append(Column(name, name, "cpu" if known.get(name).NEEDS_TARGET else None))
    return found


def models(text: str | None = None) -> list[str]:
    """Return the published architectures of the matrix: all, or those of a comma-separated list.

    Raises:
        InputError: One of them is none.
    """
    from nas.checks.zoo import zoo_names

    names = list(zoo_names())
    if text is None:
        return names
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    for name in wanted:
        if name not in names:
            raise InputError(
                "the matrix is of published architectures",
                where="MODEL",
                expected="names such as zoo/swin with commas between them, or none for all",
                found=repr(name),
                hint=did_you_mean(name, names),
            )
    return wanted


def usual_jobs() -> int:
    """Return how many rows this machine fills side by side: one for each CPU, where the memory suffices."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(machine.available_cpus()), memory // _JOB_BYTES))


def fill(
    names: Sequence[str], wanted: Sequence[Column], *, limit_s: float = CELL_LIMIT_S, jobs: int = 1
) -> Generator[tuple[str, list[Cell]], None, None]:
    """Write models.

    Args:
        names: Published architectures.
        wanted: Columns; those that are not to be had are left out.
        limit_s: Time for one cell.
        jobs: Rows side by side; the CPUs of this process are dealt out to them.

    Yields:
        Each name with its cells, in order, as soon as its row and those before it are done.

    Raises:
        InputError: There are fewer CPUs than jobs.
    """
    rows = _Rows([column for column in wanted if not column.unavailable], limit_s, jobs)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from zip(names, pool.map(rows.fill, names), strict=True)
        finally:
            rows.stop()


class _Rows:
    """Workers that fill rows, each on its share of the CPUs."""

    def __init__(self, columns: Sequence[Column], limit_s: float, jobs: int) -> None:
        cpus = machine.available_cpus()
        if not 1 <= jobs <= len(cpus):
            raise InputError(
                "each row takes a CPU of its own", where="jobs", expected=f"1 to {len(cpus)}", found=str(jobs)
            )
        self._columns, self._limit_s = columns, limit_s
        self._free: queue.SimpleQueue[Sequence[int]] = queue.SimpleQueue()
        for job in range(jobs):
            self._free.put(cpus[job::jobs])
        self._stopped = False
        self._live: dict[tuple[int, ...], Worker] = {}

    def fill(self, name: str) -> list[Cell]:
        """Fill a row, what is left of it after `stop` excepted."""
        share = self._free.get()
        try:
            with Worker(cpus=share, environment=_ENVIRONMENT) as worker:
                self._live[tuple(share)] = worker
                return list(self._cells(worker, name))
        finally:
            self._live.pop(tuple(share), None)
            self._free.put(share)

    def _cells(self, worker: Worker, name: str) -> Iterator[Cell]:
        for column in self._columns:
            if self._stopped:
                return
            yield (cell := _cell(worker, name, column, self._limit_s))
            if (cell.size_bytes or 0) > _LARGE_BYTES:
                worker.close()

    def stop(self) -> None:
        """End the rows that are being filled; their caller is gone."""
        self._stopped = True
        while self._live:
            for worker in list(self._live.values()):
                worker.kill()  # without effect on one that has yet to start
            time.sleep(_POLL_S)


def write(name: str, format: str, target: str | None, folder: str) -> dict[str, Any]:
    """Write one published architecture, with its step where it streams; runs in a worker.

    Returns:
        What `codegen.formats.Exported.to_dict` gives.
    """
    from codegen import formats, targets
    from searchspaces.space import load_space

    space, into = load_space(name), formats.get(format)
    assert space.signature is not None
    architecture = space.smallest()
    graph = architecture.graph(space.signature)
    try:
        step = architecture.graph(space.signature, mode="step")
    except InputError:
        step = None  # it does not stream
    exported = into.export(
        graph,
        _weights(graph),
        Path(folder) / f"model{into.SUFFIX}",
        step=step,
        target=targets.get(target) if target else None,
    )
    return exported.to_dict()


def _weights(graph: Graph) -> dict[str, Any]:
    """Initial weights; factors that start at nothing, zero matrices and layer scales, are moved: they hide a branch."""
    import numpy as np

    from ir.initializers import initialize

    rng = np.random.default_rng(0)
    weights: dict[str, Any] = initialize(graph, 0)
    for name, array in weights.items():
        hides = array.ndim > 1 if not array.any() else np.abs(array).max() <= _NOTHING
        if hides:
            weights[name] = array + (_APART * rng.standard_normal(array.shape)).astype(np.float32)
    return weights


def _targets(wanted: Sequence[str] | None) -> list[str]:
    from codegen import targets

    if wanted is not None:
        return list(wanted)
    planned = {name.partition(":")[0] for name in TARGETS}
    return [*TARGETS, *(name for name in targets.available() if name not in planned)]


def _target_column(name: str) -> Column:
    from codegen import targets

    try:
        targets.get(name)
    except TargetUnavailable as error:
        return Column(name, ARTIFACT, name, unavailable=_reason(error))
    return Column(name, ARTIFACT, name)


def _cell(worker: Worker, model: str, column: Column, limit_s: float) -> Cell:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nas-matrix-") as folder:
        try:
            found = worker.call(write, model, column.format, column.target, folder, timeout_s=limit_s)
        except NasError as error:
            refused = isinstance(error, TargetUnavailable) or type(error) is InputError
            reason = (error.found or error.message).strip().splitlines()[-1] if isinstance(error, RemoteError) else ""
            status, seconds = "refused" if refused else "fail", time.monotonic() - start
            return Cell(model, column.name, status, reason or _reason(error), seconds=seconds)
    return Cell(
        model,
        column.name,
        "pass",
        found["unverified"],
        found["verification_error"],
        found["size_bytes"],
        time.monotonic() - start,
    )


def _reason(error: NasError) -> str:
    """An error on one line."""
    details = [text for text in (error.where, error.found) if text]
    return " ".join(f"{type(error).__name__}: {': '.join([error.message, *details])}".split())
