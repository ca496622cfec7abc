"""The models of a suite, each compiled, checked against torch and timed beside other runtimes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from codegen import comparison, machine, targets
from codegen.comparison import OURS, Case, Outcome
from codegen.inputs import sample_inputs
from codegen.measure import device_lock
from codegen.peers import PEERS, versions
from ir.cost import profile
from ir.errors import InputError, NasError, VerificationError, did_you_mean
from ir.initializers import initialize
from nas import api, suites
from nas.bench.record import Row, code_digest, identity

if TYPE_CHECKING:
    from codegen.artifact import Artifact
    from codegen.targets.base import Target
    from nas.suites import SuiteModel

LEAST_SHARE: Final = 0.8
"""Of the multiply-adds that threads would do apart: below it they did not have a CPU each."""
ISAS: Final = tuple(comparison.LIMITS)
"""Instruction sets that a bench can be limited to."""


@dataclass(frozen=True)
class SuiteBench:
    """What to time.

    Attributes:
        suite: Name of the suite.
        models: Patterns of the models' names; all where empty.
        threads: Numbers of threads.
        peers: Whom to time them beside.
        isa: Instruction set that everyone keeps to; the machine's own where None.
        seconds: Time for the rounds of one row.
        prepare_seconds: Longest preparation of one peer.
    """

    suite: str
    models: Sequence[str] = ()
    threads: Sequence[int] = (1,)
    peers: Sequence[str] = tuple(PEERS)
    isa: str | None = None
    seconds: float = 10.0
    prepare_seconds: float = 180.0

    def chosen(self) -> list[SuiteModel]:
        """Return the models that the patterns name.

        Raises:
            InputError: A pattern names none.
        """
        offered = suites.load(self.suite)
        for pattern in self.models:
            if not any(fnmatch(model.name, pattern) for model in offered):
                names = [model.name for model in offered]
                raise InputError(
                    "no such model in this suite",
                    where="--models",
                    expected=", ".join(names),
                    found=pattern,
                    hint=did_you_mean(pattern, names),
                )
        return [m for m in offered if not self.models or any(fnmatch(m.name, pattern) for pattern in self.models)]

    def run(self, *, done: Iterable[Row] = (), keep: Callable[[Row], None], tell: Callable[[str], None]) -> list[Row]:
        """Time everything.

        Args:
            done: Rows of an earlier bench; those that this code measured on this machine are not measured again.
            keep: Gets each new row as soon as there is one.
            tell: Hears what is done.

        Returns:
            All rows, old ones included, in the suite's order.
        """
        for count in self.threads:
            machine.check_threads(count)
        facts, code = machine.describe() | {"peer_versions": versions(self.peers)}, code_digest()
        usable = {identity(row): row for row in done if _is_reusable(row, facts, code)}
        chosen = self.chosen()
        rows: list[Row] = []
        for index, model in enumerate(chosen):
            keys = {count: (self.suite, self.isa, model.name, count) for count in self.threads}
            found = {count: usable[key] for count, key in keys.items() if key in usable}
            missing = [count for count in self.threads if count not in found]
            title = f"[{index + 1}/{len(chosen)}] {model.name}"
            bench = _ModelBench(self, model, lambda line, title=title: tell(f"{title}: {line}"))
            for row in bench.rows(missing) if missing else ():
                found[row["threads"]] = row | {"code": code, "machine": facts}
                keep(found[row["threads"]])
            rows += [found[count] for count in self.threads]
        return rows


@dataclass
class _ModelBench:
    """One model at some numbers of threads; what one of them teaches about a peer holds for the next."""

    bench: SuiteBench
    model: SuiteModel
    tell: Callable[[str], None]
    unavailable: dict[str, str] = field(default_factory=dict[str, str])

    def rows(self, counts: Sequence[int]) -> Iterable[Row]:
        """Yield a row for each number of threads."""
        graph = self.model.build()
        fixed = {
            name: np.full(graph.inputs[name].types[0].shape, value, graph.inputs[name].types[0].dtype)
            for name, value in self.model.inputs.items()
        }
        case = Case(
            graph, initialize(graph, seed=0), sample_inputs(graph) | fixed, self.model.precision, self.bench.isa
        )
        with tempfile.TemporaryDirectory(prefix="nas-bench-") as name:
            folder = Path(name)
            self._export(case, folder)
            single: float | None = None
            for count in counts:
                row = self._row(case, count, folder)
                if lacks_cpus(row, single):
                    self.tell(f"{count} threads had the multiply-adds of fewer CPUs; timing again")
                    again = self._row(case, count, folder)
                    row = again if (again.get("fma_peak_gflops") or 0.0) > row["fma_peak_gflops"] else row
                single = row.get("fma_peak_gflops") if count == 1 else single
                yield row | {"cpus_lost": lacks_cpus(row, single)}

    def _export(self, case: Case, folder: Path) -> None:
        """Export where a peer that reads it will run; the reason why there is no file is theirs."""
        readers = [name for name in comparison.READS_ONNX if name in self.bench.peers]
        if case.precision != "float32" or case.isa is not None:
            readers = [name for name in readers if name != "onnxruntime"]
        if not readers:
            return
        self.tell("exporting to ONNX")
        reason = comparison.export(case, folder, self.bench.prepare_seconds)
        if reason is not None:
            self.unavailable |= dict.fromkeys(readers, reason)

    def _row(self, case: Case, count: int, folder: Path) -> Row:
        row: Row = {
            "suite": self.bench.suite,
            "isa": self.bench.isa,
            "model": self.model.name,
            "kind": self.model.kind,
            "step": self.model.step,
            "dtype": self.model.precision,
            "threads": count,
            "status": "ok",
            "ours_ms": None,
            "peers": dict.fromkeys(self.bench.peers),
            "best_peer": None,
            "ratio": None,
            "gflops": None,
            "max_error": None,
            "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        thread_text = f"{count} thread{'s' if count > 1 else ''}"
        try:
            artifact, target, compile_s = self._compile(case, count, thread_text)
            outcome = self._compare(case, artifact, target, folder, thread_text)
        except VerificationError as error:
            return row | {"status": "wrong", "reason": str(error)}
        except NasError as error:
            return row | {"status": "failed", "reason": str(error)}
        for name, reason in outcome.missing.items():
            if name not in self.unavailable and "took longer than" in reason:
                self.unavailable[name] = f"{reason} at {thread_text}"
        return row | measured(case, outcome, self.bench.peers, moved_bytes(case, artifact)) | {"compile_s": compile_s}

    def _compile(self, case: Case, count: int, thread_text: str) -> tuple[Artifact, Target, float]:
        self.tell(f"compiling for {thread_text}")
        target = targets.get("cpu", threads=count, isa=case.isa)
        precision: dict[str, Any] = {} if case.precision == "float32" else {"precision": case.precision}
        start = time.perf_counter()
        artifact = api.compile(case.graph, target=target, weights=case.parameters, opt_level=1, **precision)
        return artifact, target, time.perf_counter() - start

    def _compare(self, case: Case, artifact: Artifact, target: Target, folder: Path, thread_text: str) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="nas-bench-") as own, device_lock("cpu"):
            return comparison.compare(
                case,
                artifact.save(Path(own) / "model.nas"),
                target,
                self.bench.peers,
                folder=folder,
                unavailable=self.unavailable,
                limit_s=self.bench.prepare_seconds,
                max_seconds=self.bench.seconds,
                tell=lambda line: self.tell(f"{thread_text}, {line}"),
            )


def lacks_cpus(row: Row, single: float | None) -> bool:
    """Whether threads did not have a CPU each while a row was timed: a host may take one away for minutes.

    Args:
        row: Row of some number of threads.
        single: Multiply-add peak of one thread, GFLOP/s; None where it is not known.
    """
    peak = row.get("fma_peak_gflops")
    return bool(single and peak and row["threads"] > 1 and peak < LEAST_SHARE * row["threads"] * single)


def measured(case: Case, outcome: Outcome, names: Sequence[str], size_bytes: int) -> Row:
    """Return the figures of a row.

    Args:
        case: The model.
        outcome: What was measured.
        names: Peers that were asked for.
        size_bytes: What a call has to move at least.
    """
    found = outcome.figures
    own_ms = found[OURS]["median_ms"]
    peers = {name: found[name]["median_ms"] if name in found else None for name in names}
    ran = {name: ms for name, ms in peers.items() if ms is not None}
    best = min(ran, key=lambda name: ran[name]) if ran else None
    gflops, gbs = profile(case.graph).flops / own_ms / 1e6, size_bytes / own_ms / 1e6
    return {
        "ours_ms": own_ms,
        "peers": peers,
        "best_peer": best,
        "ratio": ran[best] / own_ms if best else None,
        "round_ratio": found[best]["ratio"] if best else None,
        "round_ratio_interval": found[best]["ratio_interval"] if best else None,
        "gflops": gflops,
        "peak_fraction": gflops / outcome.fma_peak_gflops,
        "gbs": gbs,
        "copy_fraction": gbs / outcome.copy_gbs,
        "max_error": outcome.max_error,
        "peer_errors": outcome.errors,
        "intervals_ms": {name: entry["interval_ms"] for name, entry in found.items()},
        "rounds": {name: entry["rounds"] for name, entry in found.items()},
        "missing": outcome.missing,
        "fma_peak_gflops": outcome.fma_peak_gflops,
        "copy_gbs": outcome.copy_gbs,
    }


def moved_bytes(case: Case, artifact: Artifact) -> int:
    """Bytes that a call must move: weights as the kernels read them, inputs and outputs, each once."""
    arrays = (*artifact.weights.values(), *case.inputs.values(), *artifact.expected_outputs.values())
    return sum(array.nbytes for array in arrays)


def _is_reusable(row: Mapping[str, Any], facts: Mapping[str, Any], code: str) -> bool:
    then = row.get("machine") or {}
    same_machine = all(then.get(key) == facts[key] for key in ("cpu", "logical_cpus", "versions", "peer_versions"))
    return row.get("status") == "ok" and row.get("code") == code and same_machine
