"""Measure a device: `profile(space)` times some models of a space, and keeps the figures for predicting others.

found, path = profile("tiny_lm", samples=40)
search("tiny_lm", objectives=[Quality(), PredictedLatency.of(path)])
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ir.errors import InputError, NasError, TargetUnavailable
from nas.predictors.profile import Profile, Sample, graph_features, load_profile, profile_path

if TYPE_CHECKING:
    from codegen.targets.base import Target
    from nas.objectives.base import Context
    from nas.predictors.roofline import Limits
    from nas.tasks.base import Task
    from nas.trial import Quantity
    from searchspaces.architecture import Architecture
    from searchspaces.space import Space

DEFAULT_SAMPLES = 40
_DRAWS = 20  # per sample: where models fail that often, fewer samples are all there are
_REPEATS = 50  # draws in a row that are known: the space has no more
_ROOFLINE_SECONDS = 120.0


class Measure(Protocol):
    """What gives the latency of a context's architecture."""

    def evaluate(self, context: Context) -> Quantity:
        """Compile and measure it."""
        ...


class Listener(Protocol):
    """Hears how a profile comes about."""

    def on_sample(self, profile: Profile, sample: Sample, wanted: int) -> None:
        """Hear of a model that was measured."""
        ...

    def on_failure(self, architecture: Architecture, error: NasError) -> None:
        """Hear of a model that could not be."""
        ...


def profile(
    space: str | Path | Space,
    *,
    target: str | Target = "cpu",
    threads: int | None = None,
    samples: int = DEFAULT_SAMPLES,
    batch: int = 1,
    seed: int = 0,
    out: str | Path | None = None,
    task: Task | None = None,
    measure: Measure | None = None,
    limits: Limits | None = None,
    listener: Listener | None = None,
) -> tuple[Profile, Path]:
    """Measure models of a space on a device: its smallest, middle and largest one, then random ones.

    The file is written after each, and a model that is in it is not measured again: so the same call goes on after an
    interruption, and one with more samples adds to what is there.

    Args:
        space: Search space, or its shipped name or path.
        target: Target or its name.
        threads: Threads that a model may use; None leaves it to the target.
        samples: Models that the profile shall hold in the end; fewer where the space has no more.
        batch: Sequences per call.
        seed: Decides which models are drawn.
        out: Name in the user's cache or path of the file; None makes up a name from space and target.
        task: Task of the models; None takes the space's own.
        measure: What measures; None compiles and times as a search does.
        limits: Limits of the device; None measures them.
        listener: Hears of each model.

    Returns:
        The profile and its file.

    Raises:
        InputError: The file holds a profile of something else, or is damaged.
        TargetUnavailable: There is nothing to measure on.
        MeasurementError: No model could be measured.
        StorageError: The file cannot be written.
    """
    from nas.objectives.latency import Latency
    from searchspaces.space import load_space

    if samples < 1:
        raise InputError("bad number of samples", where="samples", expected="at least 1", found=str(samples))
    loaded = load_space(space) if isinstance(space, (str, Path)) else space
    measure = measure or Latency(batch=batch, settle_seconds=0.0)
    work = _Work(loaded, task, target, threads, batch, measure, listener)
    path = profile_path(out or f"{loaded.name}-{work.target.fingerprint}" + (f"-b{batch}" if batch > 1 else ""))
    begun = work.begin(path, target if isinstance(target, str) else target.name, limits)
    return work.fill(begun, path, samples, seed), path


class _Work:
    """One call: what is measured, and how."""

    def __init__(
        self,
        space: Space,
        task: Task | None,
        target: str | Target,
        threads: int | None,
        batch: int,
        measure: Measure,
        listener: Listener | None,
    ) -> None:
        from nas.evaluate import Evaluator
        from nas.goals import Goals
        from nas.objectives.latency import Latency
        from nas.search import resolve_task

        self.space, self.batch = space, batch
        self.measure, self.listener = measure, listener
        self.evaluator = Evaluator(Goals.of([Latency()]), task or resolve_task(None, space), target, threads)
        self.target = self.evaluator.context(None).resolve_target()
        require_measurable(self.target)

    def begin(self, path: Path, target: str, limits: Limits | None) -> Profile:
        """Return the profile that is there, or an empty one."""
        from codegen import machine
        from nas.settings import space_text

        facts = machine.describe()
        sha256 = hashlib.sha256(space_text(self.space).encode()).hexdigest()
        same = {
            "fingerprint": self.target.fingerprint,
            "batch": self.batch,
            "space": {"name": self.space.name, "sha256": sha256},
        }
        if path.exists():
            found = load_profile(path)
            _check_same(found, {**same, "machine": facts["cpu"]}, path)
            return found
        limits = limits or _measure_limits(self.target)
        return Profile(
            name=path.stem,
            target=target,
            threads=self.target.threads,
            machine=facts,
            fma_peak_gflops=limits.fma_peak_gflops,
            copy_gbs=limits.copy_gbs,
            **same,
        )

    def fill(self, begun: Profile, path: Path, wanted: int, seed: int) -> Profile:
        """Measure until the profile has as many samples as wanted, and write it after each."""
        from nas.evaluate import concerns_study

        known = {sample.hash for sample in begun.samples}
        reason: NasError | None = None
        for number, architecture in enumerate(islice(_draw(self.space, seed), _DRAWS * wanted)):
            if len(begun.samples) >= wanted:
                break
            context = self.evaluator.context(architecture, number)
            try:
                key = architecture.canonical_hash(context.require_task("latency").signature)
                if key in known:
                    continue
                known.add(key)
                sample = self._sample(begun, key, context)
            except NasError as error:
                if concerns_study(error):
                    raise
                reason = error
                if self.listener is not None:
                    self.listener.on_failure(architecture, error)
                continue
            begun = replace(begun, samples=(*begun.samples, sample))
            begun.save(path)
            if self.listener is not None:
                self.listener.on_sample(begun, sample, wanted)
        if not begun.samples and reason is not None:
            raise reason
        return begun

    def _sample(self, begun: Profile, key: str, context: Context) -> Sample:
        features, least_ms = graph_features(context.graph("latency", batch=self.batch), begun)
        measured = self.measure.evaluate(context)
        return Sample(
            architecture=context.architecture.to_dict(),
            hash=key,
            features=features,
            roofline_ms=least_ms,
            latency_ms=measured.value,
            interval_ms=measured.interval,
            noisy=bool(measured.details.get("noisy")),
        )


def require_measurable(target: Target) -> None:
    """Check that code for a target runs on this machine.

    Raises:
        TargetUnavailable: It is for another processor.
    """
    if target.architecture == platform.machine():
        return
    raise TargetUnavailable(
        f"latency on '{target.name}' cannot be measured on this machine",
        where="target",
        expected=f"a target of {platform.machine()}",
        found=f"{target.name}, which is {target.architecture}",
        hint="predict it from a profile made there (`nas profile` on that device, then --latency predicted:PROFILE "
        "here), search with other objectives (--objective quality --objective flops), or only compile (`nas compile`)",
    )


def _draw(space: Space, seed: int) -> Iterator[Architecture]:
    """Return the corners of a space, then random architectures, each once, until hardly any is new."""
    import numpy as np

    rng = np.random.default_rng(seed)
    corners = (space.smallest(), space.centroid(), space.largest())
    seen: set[Architecture] = set()
    repeats = 0
    for architecture in chain(corners, iter(lambda: space.sample(rng), None)):
        repeats = repeats + 1 if architecture in seen else 0
        if repeats == _REPEATS:
            return
        if not repeats:
            seen.add(architecture)
            yield architecture


def _check_same(found: Profile, wanted: Mapping[str, Any], path: Path) -> None:
    there: dict[str, Any] = {name: getattr(found, name) for name in ("fingerprint", "batch", "space")}
    there["machine"] = found.machine.get("cpu")
    names = [name for name in wanted if there[name] != wanted[name]]
    if not names:
        return
    raise InputError(
        f"this file holds a profile with another {' and another '.join(names)}",
        where=str(path),
        expected="; ".join(f"{name} {there[name]}" for name in names),
        found="; ".join(f"{name} {wanted[name]}" for name in names),
        hint="give another --out to start anew",
    )


def _measure_limits(target: Target) -> Limits:
    """Measure arithmetic and copying in a process of its own, while nothing else is measured."""
    from codegen.measure import device_lock, pinned_worker

    with device_lock("cpu"), pinned_worker(target.threads, preload=("codegen.roofline",)) as worker:
        return worker.call(_probe, target, timeout_s=_ROOFLINE_SECONDS)


def _probe(target: Target) -> Limits:
    from codegen.roofline import make_probe

    return make_probe(target).measure()
