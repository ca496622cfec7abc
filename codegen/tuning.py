"""Choosing kernel knobs by measurement, once for each workload and target, and remembering the choice.

The database is a file of JSON lines, appended under a lock, one line for each tuned workload: any number of processes
may read and write it, and a line that a crash cut short is skipped. Candidates, runs and users of the machine share it.
"""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from codegen import _tvm, machine
from codegen.container import relative_error
from codegen.kernels.base import Array, Kernel, Knobs
from codegen.measure import device_lock, pinned_worker, sample_call
from codegen.targets.base import Target
from codegen.workers import RemoteError, Worker
from ir.errors import KernelCrash, KernelTimeout, NasError, StorageError, VerificationError

FORMAT_VERSION = 1
TOLERANCE = 1e-4  # of the output's scale, in float32; the same as for whole models
_SAMPLE_S = 0.1
_WORTH_A_CHANGE = 0.98  # a candidate must be 2 % faster than the rule's choice, which is about the noise of a sample
_ROUNDS = 7  # of the duel between the fastest candidate and the rule's choice
_WINS_NEEDED = 6  # by chance alone, a candidate no faster wins as often once in 16 duels
_LARGEST_SANE = 1e4

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
        tried: Every candidate with its status (ok, wrong, crash, timeout, error) and its time or the reason.
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

    Each candidate is built, checked against the kernel's reference and timed in a worker process; one that crashes,
    hangs or computes something else is recorded as such and costs nothing more.

    Args:
        kernels: Workloads; equal ones are tuned once.
        target: What to tune for.
        database: Where records are kept.
        trials: Candidates to try in all, shared out among the kernels, the costliest first.
        timeout_s: Longest that one candidate may take, build included.
        progress: Called with candidates done, candidates in all, and what is tried next.

    Returns:
        Tuned knobs by `Kernel.key`, of earlier runs as well.
    """
    wanted = {kernel.key: kernel for kernel in kernels}
    missing = [kernel for kernel in wanted.values() if database.record(kernel, target) is None]
    plan = _share_out(sorted(missing, key=lambda kernel: -kernel.flops), target, trials)
    total, done = sum(len(candidates) for _, candidates in plan), 0
    with pinned_worker(target.threads, preload=("codegen.tuning",)) as worker:
        for kernel, candidates in plan:
            if database.record(kernel, target) is None:  # unless another process has tuned it meanwhile
                tried: list[dict[str, Any]] = []
                for index, knobs in enumerate(candidates):
                    if progress is not None:
                        progress(done + index, total, kernel.key)
                    tried.append(_try(worker, kernel, target, knobs, timeout_s))
                database.add(_choose(worker, kernel, target, tried, timeout_s))
            done += len(candidates)
    if progress is not None and total:
        progress(total, total, "tuned")
    found = {key: database.knobs(kernel, target) for key, kernel in wanted.items()}
    return {key: knobs for key, knobs in found.items() if knobs is not None}


def sample_operands(kernel: Kernel) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Draw operands on which the kernel's reference stays in range, and the reference's results.

    A recurrence grows without bound where its decays exceed one. Whether an operand is a decay, and whether as a
    logarithm, is the kernel's own affair, so draws of both signs, of negative and of small positive numbers are tried.
    """
    rng = np.random.default_rng(0)
    draws: tuple[Callable[[tuple[int, ...]], Array], ...] = (
        lambda shape: rng.standard_normal(shape),
        lambda shape: -np.abs(rng.standard_normal(shape)),
        lambda shape: rng.uniform(0.1, 0.9, shape),
    )
    inputs: tuple[Array, ...] = ()
    results: tuple[Array, ...] = ()
    for draw in draws:
        inputs = tuple(_draw(draw, rng, operand.shape, operand.dtype) for operand in kernel.inputs)
        with np.errstate(all="ignore"):
            results = kernel.reference(*inputs)
        if all(bool(np.all(np.abs(result) < _LARGEST_SANE)) for result in results):
            break
    return inputs, results


def _draw(
    draw: Callable[[tuple[int, ...]], Array], rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> Array:
    if np.dtype(dtype).kind == "f":
        return draw(shape).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)  # an index into any table of two rows or more


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


def _try(worker: Worker, kernel: Kernel, target: Target, knobs: Knobs, timeout_s: float) -> dict[str, Any]:
    tried: dict[str, Any] = {"knobs": dict(knobs)}
    worker.start()  # a process that cannot even start is nothing that a candidate did
    try:
        with device_lock("cpu"):
            ms = worker.call(_time_candidate, kernel, target, knobs, timeout_s=timeout_s)
    except KernelCrash as error:
        return tried | {"status": "crash", "reason": _reason(error)}
    except KernelTimeout as error:
        return tried | {"status": "timeout", "reason": _reason(error)}
    except VerificationError as error:
        return tried | {"status": "wrong", "reason": _reason(error)}
    except RemoteError as error:
        return tried | {"status": "error", "reason": _reason(error)}
    return tried | {"status": "ok", "ms": ms}


def _reason(error: NasError) -> str:
    return f"{error.message}: {error.found}" if error.found else error.message


def _choose(
    worker: Worker, kernel: Kernel, target: Target, tried: Sequence[Mapping[str, Any]], timeout_s: float
) -> Record:
    """Pick the fastest candidate, unless the rule's choice holds its own against it in turns."""
    working = [candidate for candidate in tried if candidate["status"] == "ok"]
    if not working:
        return Record(kernel.key, target.fingerprint, "failed", None, None, None, tried)
    best = min(working, key=lambda candidate: candidate["ms"])
    rule = tried[0]
    if rule["status"] == "ok" and best is not rule:
        with device_lock("cpu"):
            wins, times = worker.call(_duel, kernel, target, rule["knobs"], best["knobs"], timeout_s=timeout_s)
        if wins < _WINS_NEEDED:
            return Record(kernel.key, target.fingerprint, "ok", rule["knobs"], times[0], times[0], tried)
        return Record(kernel.key, target.fingerprint, "ok", best["knobs"], times[1], times[0], tried)
    return Record(kernel.key, target.fingerprint, "ok", best["knobs"], best["ms"], rule.get("ms"), tried)


def _duel(kernel: Kernel, target: Target, rule: Knobs, challenger: Knobs) -> tuple[int, list[float]]:
    """Time two candidates in turns: what slows the machine down slows both. Runs in the worker process.

    Returns:
        Rounds in which the challenger was faster by the margin, and the median milliseconds of each.
    """
    runs = [_runnable(kernel, target, knobs) for knobs in (rule, challenger)]
    rounds = [[_milliseconds(run, _SAMPLE_S / _ROUNDS) for run in runs] for _ in range(_ROUNDS)]
    wins = sum(new < _WORTH_A_CHANGE * old for old, new in rounds)
    return wins, [float(np.median(times)) for times in zip(*rounds, strict=True)]


def _time_candidate(kernel: Kernel, target: Target, knobs: Knobs) -> float:
    """Build a candidate, check it, and return its time in milliseconds; runs in the worker process."""
    return _milliseconds(_runnable(kernel, target, knobs), _SAMPLE_S)


def _milliseconds(run: Callable[[], object], seconds: float) -> float:
    """Take the tenth percentile: what other processes add must not decide between candidates."""
    return float(np.percentile(sample_call(run, seconds), 10)) * 1e3


def _runnable(kernel: Kernel, target: Target, knobs: Knobs) -> Callable[[], object]:
    """Build a candidate, check it against the reference, and return its bare call."""
    executable = _tvm.compile_functions({"candidate": kernel.build(target.isa, knobs)}, _tvm.Target(target.to_tvm()))
    inputs, expected = _operands(kernel)
    tensors = [_tvm.device_array(_as_built(kernel, i, array, target, knobs)) for i, array in enumerate(inputs)]
    outputs = [_tvm.device_array(_poisoned(operand.shape, operand.dtype)) for operand in kernel.outputs]
    run = executable["candidate"]
    run(*tensors, *outputs)
    for found, right in zip(outputs, expected, strict=True):
        error = relative_error(found.numpy(), right)
        if not error <= TOLERANCE:
            limit = f"an error of at most {TOLERANCE:g} of the output's scale"
            raise VerificationError("the kernel disagrees with its reference", expected=limit, found=f"{error:g}")
    return lambda: run(*tensors, *outputs)


@functools.lru_cache(maxsize=1)
def _operands(kernel: Kernel) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    return sample_operands(kernel)


def _poisoned(shape: tuple[int, ...], dtype: str) -> Array:
    """Return an output buffer that shows where nothing was written."""
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -1, dtype)


def _as_built(kernel: Kernel, index: int, array: Array, target: Target, knobs: Knobs) -> Array:
    packed = kernel.pack(index, array, target.isa, knobs)
    return array if packed is None else packed


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
