"""Where latency is measured: on this machine, or on a device that listens somewhere else."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

if TYPE_CHECKING:
    from codegen.devices.client import Device
    from codegen.gpu.cuda.timing import GpuTiming
    from codegen.measure import Latency
    from codegen.targets.base import Target
    from ir.graph import Graph

_PRODUCT: Final = 1024  # rows, columns and depth; half a second on a slow board
_ADDITION: Final = 1 << 23  # elements: 64 MB read and written, beyond most caches, and as much to send


class Timer(Protocol):
    """What times artifacts: the module `codegen.measure`, or a device."""

    def measure_latency(
        self,
        artifact_path: str | Path,
        *,
        threads: int | None = None,
        max_seconds: float = 10.0,
        gpu: GpuTiming | None = None,
    ) -> Latency:
        """Time one artifact."""
        ...

    def measure_together(
        self,
        artifact_paths: Sequence[str | Path],
        *,
        threads: int | None = None,
        max_seconds: float = 20.0,
        gpu: GpuTiming | None = None,
    ) -> list[Latency]:
        """Time several in turns."""
        ...


def timer_of(device: Device | None) -> Timer:
    """Return what times for a device, this machine where None."""
    if device is not None:
        return device
    return cast(Timer, import_module("codegen.measure"))


def use_device(
    device: str | Device | None, target: str | Target, threads: int | None
) -> tuple[Device | None, str | Target]:
    """Return a device with its name, and the target to compile for: the device's own where `cpu` is asked for.

    Args:
        device: Device or its address; None is this machine.
        target: Target or its name.
        threads: Threads of a compiled model; None leaves it to the target.

    Raises:
        InputError: The address is malformed, the device has another secret, or there is no such target.
        TargetUnavailable: The device cannot be reached, or does not run the target.
    """
    if device is None:
        return None, target
    from codegen.devices.client import Device
    from codegen.devices.targets import check_target, target_of

    found = device if isinstance(device, Device) else Device.of(device)
    report = found.report()
    if isinstance(target, str):
        target = target_of(report, target, threads)
    return found.named(report.name), check_target(report, target)


@contextmanager
def held(device: Device | None) -> Iterator[None]:
    """Have a device for oneself, if there is one.

    Raises:
        TargetUnavailable: Another one keeps it, or it cannot be reached.
    """
    if device is None:
        yield
        return
    with device.hold():
        yield


def bench_on(device: Device, path: Path, threads: int | None, seconds: float) -> dict[str, Any]:
    """Time an artifact on a device; the result has the form of `codegen.peers.bench`, without peers.

    Args:
        device: The device.
        path: The `.nas` file.
        threads: Threads; all CPUs of the device where None.
        seconds: Longest time for the rounds.
    """
    found = device.measure_latency(path, threads=threads, max_seconds=seconds)
    result: dict[str, Any] = {"status": "ok", "max_error": 0.0, "rounds": found.repeats, "noisy": found.noisy}
    result |= {"median_ms": found.median_ms, "p10_ms": found.p10_ms, "p90_ms": found.p90_ms}
    result |= {"interval_ms": found.interval_ms, "ratio": 1.0, "ratio_interval": (1.0, 1.0)}
    machine = dict(found.machine)
    return {"artifact": str(path), "threads": found.threads, "machine": machine, "results": {"nas": result}}


@dataclass(frozen=True)
class DeviceLimits:
    """What a device does at best, as far as models see it.

    Attributes:
        fma_peak_gflops: Operations of a large float32 product, 10^9 a second.
        copy_gbs: Bytes read and written by a large sum of arrays, 10^9 a second.
    """

    fma_peak_gflops: float
    copy_gbs: float


def measure_limits_on(device: Device, target: Target) -> DeviceLimits:
    """Measure a large product and a large addition, both as compiled models: a device runs nothing else.

    Args:
        device: The device.
        target: Its target, with the threads that count.
    """
    from codegen.compile import compile_graph
    from ir.initializers import initialize

    with tempfile.TemporaryDirectory(prefix="nas-limits-") as folder:
        paths: list[Path] = []
        for number, graph in enumerate((_product(), _addition())):
            artifact = compile_graph(graph, initialize(graph, 0), target.without_strassen())
            paths.append(artifact.save(Path(folder) / f"limit_{number}.nas"))
        product, addition = (device.measure_latency(path, threads=target.threads, max_seconds=3.0) for path in paths)
    return DeviceLimits(2 * _PRODUCT**3 / (product.median_ms * 1e6), 2 * 4 * _ADDITION / (addition.median_ms * 1e6))


def _product() -> Graph:
    from ir.builder import Builder
    from ir.types import Axis

    b = Builder()
    weight = b.parameter("w", ((Axis("k", _PRODUCT),), (Axis("n", _PRODUCT),)))
    return b.build(y=b.matmul(b.input("x", (_PRODUCT, _PRODUCT)), weight))


def _addition() -> Graph:
    from ir.builder import Builder

    b = Builder()
    return b.build(y=b.input("x", (_ADDITION // 1024, 1024)) + 1.0)
