"""The searching side: measure on a device as if it were this machine.

device = Device.of("board:7431", secret_file="secret")
with device.hold():
    latency = device.measure_latency("model.nas")
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from codegen.devices.report import Report
from codegen.devices.serve import PORT, read_secret
from codegen.devices.session import CONNECT_S, Session
from codegen.devices.wire import WireError
from codegen.gpu.cuda.timing import GpuTiming
from codegen.measure import Latency
from ir.errors import InputError, MeasurementError, TargetUnavailable

WAIT_S: Final = 300.0
"""How long to wait for a device that is away or that another one holds, where nothing is said."""
TRIES: Final = 3
"""How often a device may go away under a measurement before the model is given up."""

_KEEP_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 10.0
_MOST_LOSSES: Final = 10  # of connections that stood: then it is not the network

T = TypeVar("T")
Tell = Callable[[str], None]


def _ignore(_stage: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Device:
    """A device that listens, see `nas device serve`; travels to other processes, which share its lease.

    Attributes:
        host: Name or address.
        port: Port.
        secret: Shared secret, None where the device has none.
        tls_ca: File with the certificates to trust, None for none.
        tls_fingerprint: SHA-256 of the device's certificate, hexadecimal, to trust that one alone.
        wait_s: How long to wait for a device that is away, or that another one holds.
        name: What it calls itself, once that is known.
        token: Names this holder to the device.
        tell: Hears what is waited for.
    """

    host: str
    port: int
    secret: bytes | None = field(default=None, repr=False)
    tls_ca: str | None = None
    tls_fingerprint: str | None = None
    wait_s: float = WAIT_S
    name: str = ""
    token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    tell: Tell = field(default=_ignore, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        address: str,
        *,
        secret_file: str | None = None,
        tls_ca: str | None = None,
        tls_fingerprint: str | None = None,
        wait_s: float = WAIT_S,
    ) -> Device:
        """Read an address such as `board:7431` or `[::1]:7431`; the secret is also taken from the environment.

        Raises:
            InputError: Something of it is malformed.
        """
        host, sign, port = address.rpartition(":")
        if not sign or "]" in port:
            host, port = address, str(PORT)
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise InputError("bad address of a device", where="--device", expected="HOST:PORT", found=repr(address))
        if not wait_s >= 0:
            raise InputError(
                "bad time to wait", where="--device-wait", expected="seconds, 0 or more", found=str(wait_s)
            )
        if tls_fingerprint is not None:
            tls_fingerprint = _read_fingerprint(tls_fingerprint)
        if tls_ca is not None and not Path(tls_ca).is_file():
            raise InputError("no such file", where="--tls-ca", expected="certificates, PEM", found=tls_ca)
        return cls(host, int(port), read_secret(secret_file), tls_ca, tls_fingerprint, wait_s)

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def named(self, name: str) -> Device:
        """Return the device with what it calls itself."""
        return replace(self, name=name)

    def telling(self, tell: Tell) -> Device:
        """Return the device with who hears what is waited for."""
        return replace(self, tell=tell)

    def report(self) -> Report:
        """Return what the device says of itself.

        Raises:
            TargetUnavailable: It cannot be reached.
        """
        return self.insist(lambda session: session.report())

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Have the device for oneself; within this, nobody else gets it between two measurements.

        Raises:
            TargetUnavailable: It cannot be reached, or another one keeps it.
        """
        if self.token in _HELD:
            yield
            return
        own = _Hold(self)
        own.start()
        _HELD.add(self.token)
        try:
            yield
        finally:
            _HELD.discard(self.token)
            own.stop()

    def measure_latency(
        self,
        artifact_path: str | Path,
        *,
        threads: int | None = None,
        max_seconds: float = 10.0,
        gpu: GpuTiming | None = None,
    ) -> Latency:
        """Time one artifact; as `measure_together`."""
        [latency] = self.measure_together([artifact_path], threads=threads, max_seconds=max_seconds, gpu=gpu)
        return latency

    def measure_together(
        self,
        artifact_paths: Sequence[str | Path],
        *,
        threads: int | None = None,
        min_rounds: int = 10,
        max_seconds: float = 20.0,
        target_interval: float = 0.02,
        gpu: GpuTiming | None = None,
    ) -> list[Latency]:
        """Time artifacts on the device; as `codegen.measure.measure_together`, whose arguments these are.

        A connection that is lost is made again, and the measurement begun anew. Artifacts stay on the device meanwhile.

        Args:
            artifact_paths: The `.nas` files.
            threads: Threads to run on; all CPUs of the device when omitted.
            min_rounds: Rounds of everyone.
            max_seconds: Time for the rounds.
            target_interval: Width of an interval at which to stop.
            gpu: How models for a GPU are timed.

        Returns:
            A record for each; its `machine` has the `device` and, beyond one, the `tries`.

        Raises:
            TargetUnavailable: The device is away or in use for longer than `wait_s`.
            MeasurementError: It went away under these models, three times.
            NasError: What measuring them here would raise.
        """
        paths = [Path(path) for path in artifact_paths]
        options: dict[str, Any] = {"threads": threads, "min_rounds": min_rounds}
        options |= {"max_seconds": max_seconds, "target_interval": target_interval}
        options |= {} if gpu is None else {"gpu": asdict(gpu)}
        lost: list[str] = []

        def work(session: Session) -> list[Latency]:
            session.hold()
            digests = session.send_missing(paths)
            try:
                found = session.measure(digests, options)
            except WireError as error:
                lost.append(str(error))
                if len(lost) == TRIES:
                    raise MeasurementError(
                        f"the device went away {TRIES} times while it measured this",
                        where=self.address,
                        expected="an answer",
                        found=lost[-1],
                    ) from error
                raise
            session.release()
            about = {"device": f"{session.name} ({self.address})"} | ({"tries": len(lost) + 1} if lost else {})
            latencies = [Latency.from_dict(values) for values in found]
            return [_with_machine(latency, about) for latency in latencies]

        return self.insist(work)

    def insist(self, work: Callable[[Session], T]) -> T:
        """Do something over a connection, and again over another one where it was lost.

        Raises:
            TargetUnavailable: The device stays away.
        """
        deadline, pause_s, losses = time.monotonic() + self.wait_s, _FIRST_PAUSE_S, 0
        while True:
            opened = False
            try:
                with Session.open(self) as session:
                    opened = True
                    return work(session)
            except WireError as error:
                if opened:
                    deadline, pause_s, losses = time.monotonic() + self.wait_s, _FIRST_PAUSE_S, losses + 1
                if time.monotonic() >= deadline or losses == _MOST_LOSSES:
                    raise TargetUnavailable(
                        "the device cannot be reached",
                        where=self.address,
                        expected="`nas device serve` there",
                        found=str(error),
                        hint="start it, or the tunnel, and give the same command again; --device-wait waits longer",
                    ) from error
                self.tell(f"waiting for the device {self.address}: {error}")
                time.sleep(min(pause_s, max(0.0, deadline - time.monotonic())))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class _Hold:
    """A lease that is kept by a connection of its own, and taken again where that is lost."""

    def __init__(self, device: Device) -> None:
        self._device, self._taken, self._ended = device, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="nas-device", daemon=True)

    def start(self) -> None:
        """Take the lease, and keep it from now on."""
        self._device.insist(self._begin)

    def _begin(self, session: Session) -> None:
        """Take the lease with one connection until the other has it, too."""
        session.hold()
        if not self._thread.is_alive():
            self._thread.start()
        self._taken.wait(CONNECT_S)
        session.release()

    def stop(self) -> None:
        """Give it up."""
        self._ended.set()
        self._thread.join(CONNECT_S)

    def _keep(self) -> None:
        while not self._ended.is_set():
            with suppress(WireError, InputError, TargetUnavailable), Session.open(self._device) as session:
                session.hold()
                self._taken.set()
                while not self._ended.wait(_KEEP_S):
                    session.keep()
                session.release()
                return
            self._ended.wait(_KEEP_S)


_HELD: Final[set[str]] = set()
"""Tokens of leases that this process keeps."""


def _with_machine(latency: Latency, about: dict[str, Any]) -> Latency:
    return replace(latency, machine={**latency.machine, **about})


def _read_fingerprint(text: str) -> str:
    digits = text.replace(":", "").lower()
    if len(digits) != 64 or not all(digit in "0123456789abcdef" for digit in digits):
        raise InputError(
            "bad fingerprint",
            where="--tls-fingerprint",
            expected="64 hexadecimal digits, as `openssl x509 -noout -fingerprint -sha256 -in CERT` prints them",
            found=repr(text),
        )
    return digits
