"""The profile of a device: how long some models take on it, and what energy where that was asked, one JSON file.

It holds features of graphs rather than of choices, so it serves other spaces than the one that was measured, too.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import InputError, StorageError, did_you_mean

if TYPE_CHECKING:
    from ir.graph import Graph
    from nas.predictors.roofline import Limits, RooflineLatency
    from nas.trial import Quantity

FORMAT_VERSION = 1
_LEAST_SHARED = 3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measured model.

    Attributes:
        architecture: What `to_dict` gives.
        hash: Canonical hash of its graph.
        features: What `graph_features` gives.
        roofline_ms: Least time by the device's limits.
        latency_ms: Measured median.
        interval_ms: Its 95 % interval.
        noisy: Whether the machine was disturbed meanwhile.
        energy_j: Measured joules a call; None where nobody asked.
    """

    architecture: dict[str, Any]
    hash: str
    features: dict[str, float]
    roofline_ms: float
    latency_ms: float
    interval_ms: tuple[float, float] | None = None
    noisy: bool = False
    energy_j: float | None = None

    def __post_init__(self) -> None:
        if not all(0 < time < math.inf for time in (self.roofline_ms, self.latency_ms)):
            raise ValueError(f"times of sample {self.hash[:12]} are not positive")
        if self.energy_j is not None and not 0 < self.energy_j < math.inf:
            raise ValueError(f"the energy of sample {self.hash[:12]} is not positive")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was measured on one device, of models of one space.

    Attributes:
        name: Short name.
        target: Target as the user wrote it, such as `cpu:avx2`.
        fingerprint: Target as databases name it, with its threads.
        threads: Threads that served a call.
        batch: Sequences per call.
        machine: Facts of the machine, see `codegen.machine.describe`.
        space: `name` and `sha256` of the space's text.
        fma_peak_gflops: Limit of arithmetic, see `codegen.roofline.Roofline`.
        copy_gbs: Limit of memory.
        samples: What was measured, in this order.
        spread: Standard deviation of the logarithms of latencies that were not measured here, see `transferred`.
        format: Version of this layout.
    """

    name: str
    target: str
    fingerprint: str
    threads: int
    batch: int
    machine: dict[str, Any]
    space: dict[str, str]
    fma_peak_gflops: float
    copy_gbs: float
    samples: tuple[Sample, ...] = ()
    spread: float = 0.0
    format: int = field(default=FORMAT_VERSION)

    @cached_property
    def sha256(self) -> str:
        """Hash of all that decides a prediction of latency."""
        samples = [
            {name: fact for name, fact in asdict(sample).items() if name != "energy_j"} for sample in self.samples
        ]
        return self._hash(samples)

    @cached_property
    def energy_sha256(self) -> str:
        """Hash of all that decides a prediction of energy."""
        return self._hash([(sample.features, sample.roofline_ms, sample.energy_j) for sample in self.energy_samples()])

    @cached_property
    def model(self) -> RooflineLatency:
        """The predictor, fitted on the samples."""
        from nas.predictors.roofline import RooflineLatency

        return RooflineLatency.fit(
            [sample.features for sample in self.samples],
            [sample.roofline_ms for sample in self.samples],
            [sample.latency_ms for sample in self.samples],
        )

    @cached_property
    def energy_model(self) -> RooflineLatency:
        """The predictor of energy: the roofline's time times a factor, in joules."""
        from nas.predictors.roofline import RooflineLatency

        samples = self.energy_samples()
        return RooflineLatency.fit(
            [sample.features for sample in samples],
            [sample.roofline_ms for sample in samples],
            [sample.energy_j or 0.0 for sample in samples],
        )

    def energy_samples(self) -> list[Sample]:
        """Return the samples whose energy was measured.

        Raises:
            InputError: There is none.
        """
        found = [sample for sample in self.samples if sample.energy_j is not None]
        if found:
            return found
        raise InputError(
            "the profile holds no energy",
            where=self.name,
            expected="samples with their energy, measured on the device itself",
            found="latency alone",
            hint="`nas profile SPACE --energy --out NAME` adds it, where the machine counts energy",
        )

    def predict_energy(self, graph: Graph) -> Quantity:
        """Return the energy of a call on the device, joules, as `predict` returns its latency.

        Args:
            graph: Model at the profile's batch.

        Raises:
            InputError: No sample has its energy.
        """
        return self._predict(self.energy_model, self.energy_samples(), graph, "J")

    def predict(self, graph: Graph) -> Quantity:
        """Return the latency of a model on the device, milliseconds, marked as predicted, with a 95 % interval.

        A model far outside of what was measured, by its roofline, is marked `outside`.

        Args:
            graph: Model at the profile's batch.
        """
        return self._predict(self.model, self.samples, graph, "ms")

    def _hash(self, samples: Any) -> str:
        import msgspec

        decisive = (self.fma_peak_gflops, self.copy_gbs, self.batch, samples, self.spread)
        return hashlib.sha256(msgspec.json.encode(decisive)).hexdigest()

    def _predict(self, model: RooflineLatency, samples: Sequence[Sample], graph: Graph, unit: str) -> Quantity:
        import numpy as np

        features, least_ms = graph_features(graph, self)
        found = model.predict([features], [least_ms])
        mean = float(found.mean_N[0])
        std = math.hypot(float(found.std_N[0]), mean * self.spread)
        known = np.array([sample.roofline_ms for sample in samples])
        details: dict[str, Any] = {"profile": self.name, "samples": len(samples), "roofline_ms": least_ms}
        details |= {"machine": self.machine.get("cpu"), "threads": self.threads}
        details |= {} if known.min() / 2 <= least_ms <= known.max() * 2 else {"outside": True}
        [quantity] = found.quantities(unit)
        return replace(quantity, interval=(max(mean - 1.96 * std, 0.0), mean + 1.96 * std), details=details)

    def save(self, path: Path) -> None:
        """Write the profile, in place of an older one.

        Raises:
            StorageError: It cannot be written.
        """
        import msgspec

        from ir.files import replace_file

        try:
            replace_file(path, msgspec.json.format(msgspec.json.encode(self)))
        except OSError as error:
            raise StorageError("the profile cannot be written", where=str(path), found=error.strerror) from error


def graph_features(graph: Graph, limits: Limits) -> tuple[dict[str, float], float]:
    """Return what a latency is predicted from, and the roofline in milliseconds.

    Features are logarithms of totals, and the share of each kind of operation in the roofline's time.

    Args:
        graph: Model, composite operations expanded.
        limits: Of the device.
    """
    from ir.cost import node_costs
    from nas.predictors.roofline import roofline_ms

    costs = node_costs(graph)
    total_ms = roofline_ms(graph, limits)
    time_ms: defaultdict[str, float] = defaultdict(float)
    for cost in costs:
        seconds = max(cost.flops / limits.fma_peak_gflops, cost.bytes_moved / limits.copy_gbs) / 1e9
        time_ms[cost.node.op.name] += seconds * 1e3
    totals = {
        "log_flops": sum(cost.flops for cost in costs),
        "log_bytes": sum(cost.bytes_moved for cost in costs),
        "log_nodes": len(costs),
    }
    features = {name: math.log1p(total) for name, total in totals.items()} | {"log_roofline": math.log(total_ms)}
    return features | {f"share.{name}": spent / total_ms for name, spent in time_ms.items() if spent > 0}, total_ms


def transferred(new: Profile, known: Sequence[Profile]) -> Profile:
    """Return a profile of a device with few samples, with latencies of more models from devices that have them.

    What all the known devices measured is taken to the new one by what it measured of these, see `DeviceTransfer`.
    Features and limits are those of the first known device; error bars are widened by the error of the transfer.

    Args:
        new: The device with few samples.
        known: Devices over the same models; `nas profile` draws the same ones for one space and seed.

    Raises:
        InputError: They were measured at another batch, or the new device shares fewer than 3 models with them.
    """
    import numpy as np

    from nas.predictors.transfer import DeviceTransfer

    by_hash = [{sample.hash: sample.latency_ms for sample in device.samples} for device in known]
    shared = [sample for sample in known[0].samples if all(sample.hash in there for there in by_hash)]
    measured = {sample.hash: sample.latency_ms for sample in new.samples}
    rows = [row for row, sample in enumerate(shared) if sample.hash in measured]
    if len(rows) < _LEAST_SHARED or any(device.batch != new.batch for device in known):
        raise InputError(
            "these profiles do not go together",
            where=", ".join(device.name for device in (new, *known)),
            expected=f"at least {_LEAST_SHARED} models that all of them measured, at one batch",
            found=f"{len(rows)} models, batches {', '.join(str(device.batch) for device in (new, *known))}",
            hint="run `nas profile` with the same space, --seed and --batch on each device",
        )
    known_ND = np.array([[there[sample.hash] for there in by_hash] for sample in shared])
    transfer = replace(DeviceTransfer.of(known_ND, len(rows)), samples=rows)
    found = transfer.predict([measured[shared[row].hash] for row in rows])
    samples = tuple(
        replace(sample, latency_ms=measured.get(sample.hash, float(mean)), interval_ms=None, energy_j=None)
        for sample, mean in zip(shared, found.mean_N, strict=True)
    )
    base = known[0]
    return replace(
        new,
        name=",".join(device.name for device in (new, *known)),
        fma_peak_gflops=base.fma_peak_gflops,
        copy_gbs=base.copy_gbs,
        samples=samples,
        spread=float(found.std_N[0] / found.mean_N[0]),
    )


def profile_folder() -> Path:
    """Return the folder of profiles that are known by name, in the user's cache."""
    from codegen import machine

    return machine.cache_directory() / "profiles"


def profile_path(name_or_path: str | Path) -> Path:
    """Return the file of a profile: a path where it looks like one, else a name in the user's cache."""
    text = str(name_or_path)
    return Path(text).expanduser() if "/" in text or text.endswith(".json") else profile_folder() / f"{text}.json"


def load_profile(name_or_path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        InputError: There is none, or it is damaged or empty.
    """
    import msgspec

    path = profile_path(name_or_path)
    remake = "`nas profile SPACE --out NAME` makes one"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Profile)
    except FileNotFoundError as error:
        known = sorted(other.stem for other in profile_folder().glob("*.json"))
        hint = did_you_mean(str(name_or_path), known)
        listed = ", ".join(known) or "none"
        raise InputError(
            "no such profile of a device",
            where=str(path),
            expected=f"a path, or a name out of: {listed}",
            found=str(name_or_path),
            hint=f"{hint} {remake}" if hint else remake,
        ) from error
    except OSError as error:
        raise InputError("the profile cannot be read", where=str(path), found=error.strerror, hint=remake) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        hint = f"remove it; {remake}"
        raise InputError("the profile is damaged", where=str(path), found=str(error), hint=hint) from error
    if not found.samples:
        raise InputError("the profile holds no sample", where=str(path), hint=f"remove it; {remake}")
    if found.format != FORMAT_VERSION:
        expected = f"format {FORMAT_VERSION}"
        raise InputError("the profile has another format", where=str(path), expected=expected, found=str(found.format))
    return found
