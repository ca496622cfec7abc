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
from nas.devices import held, measure_limits_on, use_device
from nas.predictors.profile import Profile, Sample, graph_features, load_profile, profile_path

if TYPE_CHECKING:
    from codegen.devices.client import Device
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
_ELSEWHERE = (
    "measure on a machine that has one (`nas device serve` there, --device HOST:PORT here), predict it from a profile "
    "made there (--latency predicted:PROFILE), "
)


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
    energy: Measure | None = None,
    limits: Limits | None = None,
    listener: Listener | None = None,
    device: str | Device | None = None,
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
        energy: What measures energy besides, such as `nas.Energy(batch=batch)`; samples without it get it then.
        limits: Limits of the device; None measures them.
        listener: Hears of each model.
        device: What is profiled, `host:port` of `nas device serve`; None is this machine.

    Returns:
        The profile and its file.

    Raises:
        InputError: The file holds a profile of something else, or is damaged.
        TargetUnavailable: There is nothing to measure on, or nothing that counts energy.
        MeasurementError: No model could be measured.
        StorageError: The file cannot be written.
    """
    from nas.objectives.energy import Energy
    from nas.objectives.latency import Latency
    from searchspaces.space import load_space

    if samples < 1:
        raise InputError("bad number of samples", where="samples", expected="at least 1", found=str(samples))
    loaded = load_space(space) if isinstance(space, (str, Path)) else space
    measure = measure or Latency(batch=batch, settle_seconds=0.0)
    if isinstance(energy, Energy):
        energy.bind(None)  # what counts energy is looked for before anything is measured
    device, target = use_device(device, target, threads)
    work = _Work(loaded, task, target, threads, batch, measure, listener, device)
    path = profile_path(out or f"{loaded.name}-{work.target.fingerprint}" + (f"-b{batch}" if batch > 1 else ""))
    with held(device):
        begun = work.begin(path, target if isinstance(target, str) else target.name, limits)
        filled = work.fill(begun, path, samples, seed)
        return filled if energy is None else work.add_energy(filled, path, energy), path


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
        device: Device | None,
    ) -> None:
        from nas.evaluate import Evaluator
        from nas.goals import Goals
        from nas.objectives.latency import Latency
        from nas.search import resolve_task

        self.space, self.batch = space, batch
        self.measure, self.listener = measure, listener
        goals, task = Goals.of([Latency()]), task or resolve_task(None, space)
        self.evaluator = Evaluator(goals, task, target, threads, device=device)
        self.target = self.evaluator.context(None).resolve_target()
        if device is None:
            require_measurable(self.target)

    def begin(self, path: Path, target: str, limits: Limits | None) -> Profile:
        """Return the profile that is there, or an empty one."""
        from codegen import machine
        from nas.settings import space_text

        device = self.evaluator.device
        facts = dict(device.report().machine) if device is not None else machine.describe()
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
        limits = limits or (_measure_limits(self.target) if device is None else measure_limits_on(device, self.target))
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

    def add_energy(self, found: Profile, path: Path, energy: Measure) -> Profile:
        """Measure the energy of samples that have none, and write the profile after each."""
        from nas.evaluate import concerns_study

        for place, sample in enumerate(found.samples):
            if sample.energy_j is not None:
                continue
            context = self.evaluator.context(self.space.architecture(sample.architecture), place)
            try:
                used_j = energy.evaluate(context).value
            except NasError as error:
                if concerns_study(error):
                    raise
                if self.listener is not None:
                    self.listener.on_failure(context.architecture, error)
                continue
            samples = list(found.samples)
            samples[place] = replace(sample, energy_j=used_j)
            found = replace(found, samples=tuple(samples))
            found.save(path)
        return found

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


def is_measurable(target: Target) -> bool:
    """Tell whether code for a target runs on this machine."""
    try:
        require_measurable(target)
    except TargetUnavailable:
        return False
    return True


def require_measurable(target: Target) -> None:
    """Check that code for a target runs on this machine.

    Raises:
        TargetUnavailable: It is for another processor, or for a graphics processor that is not here.
    """
    if target.gpu is not None:
        _require_gpu(target)
    elif target.architecture != platform.machine():
        raise _unmeasurable(
            target, f"a target of {platform.machine()}", f"{target.name}, which is {target.architecture}", _ELSEWHERE
        )


def _require_gpu(target: Target) -> None:
    from codegen.gpu.cuda import device

    assert target.gpu is not None
    if target.gpu.kind != "cuda":
        reason = f"nothing in this version starts kernels of {target.gpu.kind} to time them"
        raise _unmeasurable(target, "cuda, or a processor", reason, "")
    if reason := device.why_not_run(target.gpu.model):
        raise _unmeasurable(target, f"a GPU for {target.gpu.model}", reason, _ELSEWHERE)


def _unmeasurable(target: Target, expected: str, found: str, elsewhere: str) -> TargetUnavailable:
    """Say what cannot be done, and the ways out."""
    return TargetUnavailable(
        f"latency on '{target.name}' cannot be measured on this machine; all else of a search can be done here",
        where="target",
        expected=expected,
        found=found,
        hint=f"{elsewhere}search with other objectives (--objective quality --objective flops), or only compile "
        f"(`nas compile --target {target.name}`)",
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
