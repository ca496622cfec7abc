"""Choosing kernel knobs by measurement, once for each workload and target, and remembering the choice.

The database is a file of JSON lines, appended under a lock, one line for each tuned workload: any number of processes
may read and write it, and a line that a crash cut short is skipped. Candidates, runs and users of the machine share it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np

from codegen import machine
from codegen.kernels.base import Kernel, Knobs
from codegen.measure import device_lock, pinned_worker
from codegen.targets.base import Target
from codegen.trials import Candidate, build_candidate, compare, time_candidate
from codegen.workers import RemoteError, Worker
from ir.errors import KernelCrash, KernelTimeout, NasError, StorageError, VerificationError

FORMAT_VERSION = 2
_WORTH_A_CHANGE = 0.98  # a candidate must be 2 % faster than the rule's choice, which is about the noise of a sample
_WINS_NEEDED = 6  # of 7 rounds; by chance alone, a candidate no faster wins as often once in 16 duels
_CHALLENGERS = 2  # the fastest so far may have been lucky
_MOST_BUILDERS = 8  # a process each

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Record:
    """What is known of one workload on one target.

    Attributes:
        kernel: The workload, `Kernel.key`.
        target: `Target.fingerprint`.
        status: `ok`, or `failed` where no candidate worked.
        knobs: The best candidate, None where none worked.
        ms: Its time.
        rule_ms: Time of the candidate that would be used without tuning.
        tried: Every candidate with its status (ok, wrong, crash, timeout, error) and its time or the reason. The time
            of one that was clearly slower than the best is rough.
        duel: How the best of the others did against the rule's choice, timed in turns: its knobs, `ms`, `rule_ms`, and
            in how many of the rounds it won. Without a clear win the rule's choice stays. None where nothing was
            faster than the rule's choice to begin with.
        versions: Software that built and timed them.
        written: UTC time, ISO 8601.
    """

    kernel: str
    target: str
    status: str
    knobs: Knobs | None
    ms: float | None
    rule_ms: float | None
    tried: Sequence[Mapping[str, Any]] = ()
    duel: Mapping[str, Any] | None = None
    versions: Mapping[str, str | None] = field(default_factory=machine.versions)
    written: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))


class TuningDatabase:
    """Tuned knobs by workload and target, in `<folder>/records.jsonl`.

    Args:
        folder: Where the file lies; made with the first record.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "records.jsonl"
        self._seen: tuple[int, int] | None = None
        self._records: dict[tuple[str, str], Record] = {}

    @classmethod
    def for_target(cls, target: Target, root: str | Path | None = None) -> TuningDatabase:
        """Open the database of a target.

        Args:
            target: Whose records.
            root: Folder of all targets' databases; `NAS_TUNING_DIR`, else `tuning` in the cache, when omitted.
        """
        chosen = root or os.environ.get("NAS_TUNING_DIR") or machine.cache_directory() / "tuning"
        return cls(Path(chosen).expanduser() / target.fingerprint)

    def record(self, kernel: Kernel, target: Target) -> Record | None:
        """Return the last record of a workload, as of now, whichever process wrote it."""
        self._refresh()
        return self._records.get((kernel.key, target.fingerprint))

    def knobs(self, kernel: Kernel, target: Target) -> Knobs | None:
        """Return the tuned knobs, or None where there are none or the kernel generator no longer has them."""
        record = self.record(kernel, target)
        if record is None or record.knobs is None:
            return None
        return record.knobs if record.knobs in kernel.knob_space(target.isa) else None

    def identity(self, kernel: str, target: Target) -> str | None:
        """Return 16 hexadecimal digits that name the record of a workload; None where there is none."""
        record = self._records.get((kernel, target.fingerprint))
        if record is None:
            return None
        return hashlib.sha256(json.dumps(asdict(record), sort_keys=True).encode()).hexdigest()[:16]

    def add(self, record: Record) -> None:
        """Append a record.

        Raises:
            StorageError: The file cannot be written.
        """
        line = json.dumps({"format_version": FORMAT_VERSION, **asdict(record)}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes
                if _ends_inside_line(file.fileno()):
                    line = "\n" + line
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            hint = "choose another folder with --tuning-dir or NAS_TUNING_DIR"
            raise StorageError(
                "cannot write the tuning database", where=str(self.path), found=error.strerror, hint=hint
            ) from error

    def __len__(self) -> int:
        self._refresh()
        return len(self._records)

    def _refresh(self) -> None:
        try:
            state = self.path.stat()
            if (state.st_size, state.st_mtime_ns) == self._seen:
                return
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError("cannot read the tuning database", where=str(self.path), found=error.strerror) from error
        self._seen = (state.st_size, state.st_mtime_ns)
        records = (_parse(line) for line in lines)
        self._records = {(record.kernel, record.target): record for record in records if record is not None}


def tune(
    kernels: Iterable[Kernel],
    target: Target,
    database: TuningDatabase,
    *,
    trials: int,
    timeout_s: float = 10.0,
    progress: Progress | None = None,
) -> dict[str, Knobs]:
    """Measure the alternatives of every kernel that has no record yet, and record the best.

    Candidates are built on all CPUs, then checked against the kernel's reference and timed one by one, all in worker
    processes; one that crashes, hangs or computes something else is recorded as such and costs nothing more.

    Args:
        kernels: Workloads; equal ones are tuned once.
        target: What to tune for.
        database: Where records are kept.
        trials: Candidates to try in all, shared out among the kernels, the costliest first.
        timeout_s: Longest that one candidate may take to be built, and again to be checked and timed.
        progress: Called with candidates done, candidates in all, and what is tried next.

    Returns:
        Tuned knobs by `Kernel.key`, of earlier runs as well.
    """
    wanted = {kernel.key: kernel for kernel in kernels}
    missing = [kernel for kernel in wanted.values() if database.record(kernel, target) is None]
    plan = _share_out(sorted(missing, key=lambda kernel: -kernel.flops), target, trials)
    total, done = sum(len(candidates) for _, candidates in plan), 0
    builders = min(_MOST_BUILDERS, len(machine.available_cpus()), max((len(space) for _, space in plan), default=1))
    with _Workshop(target, builders, timeout_s) as workshop:
        if plan:
            workshop.start()
        for kernel, space in plan:
            if database.record(kernel, target) is None:  # unless another process has tuned it meanwhile
                tell = functools.partial(_tell, progress, total, kernel.key, done)
                database.add(_tune_kernel(workshop, kernel, target, space, tell))
            done += len(space)
    if progress is not None and total:
        progress(total, total, "tuned")
    found = {key: database.knobs(kernel, target) for key, kernel in wanted.items()}
    return {key: knobs for key, knobs in found.items() if knobs is not None}


def _share_out(kernels: Sequence[Kernel], target: Target, trials: int) -> list[tuple[Kernel, list[Knobs]]]:
    """Pick each kernel's candidates: the rule's choice, then others spread evenly over its space."""
    plan: list[tuple[Kernel, list[Knobs]]] = []
    left = trials
    for position, kernel in enumerate(kernels):
        share = math.ceil(left / (len(kernels) - position))
        space = kernel.knob_space(target.isa)
        count = min(share, len(space))
        if count:
            step = (len(space) - 1) / max(1, count - 1)
            plan.append((kernel, [space[round(i * step)] for i in range(count)]))
            left -= count
    return plan


class _Workshop:
    """Workers that build candidates side by side; the first, alone on the device meanwhile, also times them."""

    def __init__(self, target: Target, builders: int, timeout_s: float) -> None:
        self._target, self._timeout_s = target, timeout_s
        self._bench = pinned_worker(target.threads, preload=("codegen.trials",))
        others = [pinned_worker(1, first=number, preload=("codegen.trials",)) for number in range(1, builders)]
        self._builders = [self._bench, *others]

    def __enter__(self) -> _Workshop:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._builders:
            worker.close()

    def start(self) -> None:
        """Start all processes, side by side."""
        with ThreadPoolExecutor(len(self._builders)) as threads:
            list(threads.map(Worker.start, self._builders))

    def build(self, kernel: Kernel, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
        """Build candidates; each becomes a report that says how it went, by `status`, unless it went well."""
        idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._builders:
            idle.put(worker)

        def build(candidate: Candidate) -> dict[str, Any]:
            worker = idle.get()
            try:
                return self._attempt(worker, build_candidate, kernel, candidate)
            finally:
                idle.put(worker)

        with ThreadPoolExecutor(len(self._builders)) as threads:
            return list(threads.map(build, candidates))

    def time(self, kernel: Kernel, candidate: Candidate, best_ms: float) -> dict[str, Any]:
        """Check and time a candidate; the report has its `ms`, or says what is wrong with it."""
        self._bench.start()  # a process that cannot even start is nothing that a candidate did
        with device_lock("cpu"):
            return self._attempt(self._bench, time_candidate, kernel, candidate, best_ms)

    def compare(self, kernel: Kernel, candidates: Sequence[Candidate]) -> list[list[float]]:
        """Time working candidates in turns; see `trials.compare`."""
        with device_lock("cpu"):
            return self._bench.call(compare, kernel, self._target, candidates, timeout_s=self._timeout_s)

    def _attempt(
        self, worker: Worker, function: Callable[..., Any], kernel: Kernel, candidate: Candidate, *more: Any
    ) -> dict[str, Any]:
        tried: dict[str, Any] = {"knobs": dict(candidate[0])}
        try:
            ms = worker.call(function, kernel, self._target, candidate, *more, timeout_s=self._timeout_s)
        except KernelCrash as error:
            return tried | {"status": "crash", "reason": _reason(error)}
        except KernelTimeout as error:
            return tried | {"status": "timeout", "reason": _reason(error)}
        except VerificationError as error:
            return tried | {"status": "wrong", "reason": _reason(error)}
        except RemoteError as error:
            return tried | {"status": "error", "reason": _reason(error)}
        return tried if ms is None else tried | {"status": "ok", "ms": ms}


def _tune_kernel(
    workshop: _Workshop, kernel: Kernel, target: Target, space: Sequence[Knobs], progress: Callable[[int], None]
) -> Record:
    """Try candidates of one kernel and choose."""
    with tempfile.TemporaryDirectory(prefix="nas-") as folder:
        candidates = [(knobs, f"{folder}/{number}.so") for number, knobs in enumerate(space)]
        progress(0)
        tried = workshop.build(kernel, candidates)
        best_ms = math.inf
        for number, candidate in enumerate(candidates):
            if number:
                progress(number)
            if "status" not in tried[number]:
                tried[number] = workshop.time(kernel, candidate, best_ms)
                best_ms = min(best_ms, tried[number].get("ms", math.inf))
        return _choose(workshop, kernel, target, candidates, tried)


def _tell(progress: Progress | None, total: int, kernel: str, before: int, number: int) -> None:
    if progress is not None:
        progress(before + number, total, kernel)


def _choose(
    workshop: _Workshop,
    kernel: Kernel,
    target: Target,
    candidates: Sequence[Candidate],
    tried: Sequence[Mapping[str, Any]],
) -> Record:
    """Pick the fastest candidate, unless the rule's choice, the first, holds its own against it in turns."""
    place = kernel.key, target.fingerprint
    ranked = sorted((i for i, one in enumerate(tried) if one["status"] == "ok"), key=lambda i: tried[i]["ms"])
    if not ranked:
        return Record(*place, "failed", None, None, None, tried)
    best = ranked[0]
    if best == 0 or 0 not in ranked:
        return Record(*place, "ok", tried[best]["knobs"], tried[best]["ms"], tried[0].get("ms"), tried)
    challengers = [i for i in ranked[:_CHALLENGERS] if i != 0]
    rounds = workshop.compare(kernel, [candidates[i] for i in (0, *challengers)])
    rule_ms, *challenger_ms = (float(np.median(times)) for times in zip(*rounds, strict=True))
    ms = min(challenger_ms)
    position = challenger_ms.index(ms)
    wins = sum(times[1 + position] < _WORTH_A_CHANGE * times[0] for times in rounds)
    knobs = tried[challengers[position]]["knobs"]
    duel = {"knobs": knobs, "ms": ms, "rule_ms": rule_ms, "wins": wins, "rounds": len(rounds)}
    if wins < _WINS_NEEDED:
        return Record(*place, "ok", tried[0]["knobs"], rule_ms, rule_ms, tried, duel)
    return Record(*place, "ok", knobs, ms, rule_ms, tried, duel)


def _reason(error: NasError) -> str:
    return f"{error.message}: {error.found}" if error.found else error.message


def _ends_inside_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _parse(line: bytes) -> Record | None:
    """Read a line; None for one that was cut short or has another format."""
    try:
        fields = json.loads(line)
        if fields.pop("format_version") == FORMAT_VERSION:
            return Record(**fields)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return None
