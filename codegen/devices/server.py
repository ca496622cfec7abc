"""The device's side: connections, each in a thread, and one process that measures.

What a connection may do, in this order: greet, `status` as often as it likes, `hold` the device, send artifacts that
are not here yet, `measure`. All generated code runs in a worker process of its own, which is killed when whoever asked
for it goes away.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Protocol

from codegen import machine, measure, tvm_runtime
from codegen.devices.lease import Leases
from codegen.devices.uploads import Upload, Uploads, check_digest
from codegen.devices.wire import (
    BEAT_S,
    VERSION,
    Take,
    Wire,
    WireError,
    binding_of,
    describe_error,
    greet_searcher,
)
from codegen.gpu.cuda.timing import GpuTiming
from codegen.workers import Worker
from ir.errors import InputError, KernelCrash, NasError

GRACE_S: Final = 30.0
"""A lease waits so long for a holder whose connections were lost."""
IDLE_S: Final = 60.0
"""A connection that says nothing for so long is gone; who holds the device speaks every few seconds."""
MOST_ARTIFACTS: Final = 16
"""In one measurement; all are in memory at once."""

_MOST_CONNECTIONS: Final = 64
_LONGEST_S: Final = 600.0
_LONGEST_WAIT_S: Final = 24 * 3600.0
_MOST_ROUNDS: Final = 1000
_START_S: Final = 120.0
_BESIDE_S: Final = 300.0  # for others on the device that measure without this server
_NAME_CHARACTERS: Final = 200


class Runs(Protocol):
    """What runs functions in another process, such as a `Worker`."""

    def call(self, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
        """Run a function there and return its result."""
        ...

    def kill(self) -> None:
        """End the process; who waits for a result hears of a crash."""
        ...


@dataclass(frozen=True)
class Limits:
    """Bounds on what a device takes.

    Attributes:
        artifact_bytes: Of one artifact.
        cache_bytes: Of all that are kept.
    """

    artifact_bytes: int = 1 << 30
    cache_bytes: int = 4 << 30


class Server:
    """A device that listens.

    Args:
        listener: Bound and listening socket.
        name: What the device is called.
        folder: Where artifacts are kept.
        secret: Who connects must know it; None lets everybody in that can connect.
        tls: Context with the certificate, and its DER bytes; None leaves connections as they are.
        limits: Bounds.
        worker: Where generated code runs; a process of its own where None.

    Raises:
        NasError: The TVM runtime cannot be loaded here, or the folder cannot be made.
    """

    def __init__(
        self,
        listener: socket.socket,
        name: str,
        folder: Path,
        *,
        secret: bytes | None = None,
        tls: tuple[ssl.SSLContext, bytes] | None = None,
        limits: Limits | None = None,
        worker: Runs | None = None,
    ) -> None:
        self._listener, self.name, self.secret, self._tls = listener, name, secret, tls
        self.limits = limits or Limits()
        self.leases = Leases(GRACE_S)
        self.uploads = Uploads(folder, self.limits.cache_bytes)
        self._places = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._measuring = threading.Lock()
        self._worker: Runs = worker or Worker(preload=("codegen.measure",), without=("torch",))
        self._worker.call(_require_runtime, timeout_s=_START_S)

    def run(self) -> None:
        """Serve until `close`."""
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            if not self._places.acquire(blocking=False):
                end.close()
                continue
            threading.Thread(target=self._serve, args=(end,), daemon=True).start()

    def close(self) -> None:
        """Stop listening and end the process that measures."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._worker.kill()

    def describe(self) -> dict[str, Any]:
        """Return what the device says of itself."""
        return {
            "name": self.name,
            "version": VERSION,
            "machine": machine.describe(),
            "lease": self.leases.describe(),
            "uploads": self.uploads.describe(),
            "artifact_bytes": self.limits.artifact_bytes,
        }

    def measure(self, request: Mapping[str, Any], wire: Wire) -> list[dict[str, Any]]:
        """Time artifacts; the process that does is killed when nobody listens any more.

        Raises:
            WireError: Nobody does.
            NasError: They cannot be measured.
        """
        paths, options, limit_s = self._checked(request)
        while not self._measuring.acquire(timeout=BEAT_S):
            wire.send({"beat": "another process of this holder measures"})
        with ExitStack() as stack:
            stack.callback(self._measuring.release)
            beside = stack.enter_context(ThreadPoolExecutor(1))
            running = beside.submit(self._worker.call, _measure, paths, options, timeout_s=limit_s)
            return self._beat_until(running, wire)

    def _beat_until(self, running: Future[Any], wire: Wire) -> Any:
        try:
            while True:
                try:
                    return running.result(BEAT_S)
                except NotYet:
                    if running.done():  # it was the measurement that ran out of time
                        raise
                    wire.send({"beat": "measuring"})
        except WireError:
            self._worker.kill()
            with suppress(KernelCrash):
                running.result()
            raise

    def _checked(self, request: Mapping[str, Any]) -> tuple[list[str], dict[str, Any], float]:
        """Return paths, keywords of `measure_together`, and the limit of the call."""
        digests = request.get("artifacts")
        if not isinstance(digests, list) or not 1 <= len(digests) <= MOST_ARTIFACTS:
            raise InputError("bad list of artifacts", expected=f"1 to {MOST_ARTIFACTS}", found=repr(digests)[:80])
        paths = [self.uploads.find(digest) for digest in digests]
        if None in paths:
            raise InputError("an artifact is not here", where="artifacts", found="one that was not sent, or removed")
        seconds = _number(request, "max_seconds", 0.01, _LONGEST_S)
        options: dict[str, Any] = {
            "max_seconds": seconds,
            "min_rounds": int(_number(request, "min_rounds", 6, _MOST_ROUNDS)),
            "target_interval": _number(request, "target_interval", 1e-4, 1.0),
        }
        if request.get("threads") is not None:
            options["threads"] = int(_number(request, "threads", 1, 4096))
        if request.get("gpu") is not None:
            options["gpu"] = _gpu_timing(request["gpu"])
        return [str(path) for path in paths], options, 4 * seconds + _BESIDE_S

    def _serve(self, end: socket.socket) -> None:
        """Serve one connection; whatever becomes of it, the others are served on."""
        try:
            own = None
            if self._tls is not None:
                context, own = self._tls
                end.settimeout(10.0)
                end = context.wrap_socket(end, server_side=True)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire = Wire(end)
            with suppress(WireError):
                _Session(self, wire, binding_of(end, own)).run()
            wire.close()
        except OSError:  # a handshake that failed, or a connection that is gone
            end.close()
        finally:
            self._places.release()


class _Session:
    """One connection from its greeting on."""

    def __init__(self, server: Server, wire: Wire, binding: bytes) -> None:
        self._server, self._wire, self._binding = server, wire, binding
        self._holds = self._released = False
        self._upload: Upload | None = None
        self._announced: tuple[str, int] | None = None

    def run(self) -> None:
        try:
            greet_searcher(self._wire, self._server.secret, self._binding)
        except NasError as error:
            threading.Event().wait(0.5)  # who guesses shall wait
            self._wire.send(describe_error(error))
            return
        try:
            while self._step():
                pass
        finally:
            if self._upload is not None:
                self._upload.cancel()
            if self._holds:
                self._server.leases.detach(orderly=False)

    def _step(self) -> bool:
        """Answer one message; return whether there may be more."""
        try:
            message = self._wire.receive(
                IDLE_S, largest_body=self._announced[1] if self._announced else 0, open_body=self._open
            )
        except NasError as error:  # in the middle of a file
            self._wire.send(describe_error(error))
            return False
        try:
            answer = self._answer(message)
        except NasError as error:
            answer = describe_error(error)
        self._wire.send(answer)
        return not self._released

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        op = message.get("op")
        if op == "status":
            return {"ok": True, "device": self._server.describe()}
        if op == "hold":
            return self._hold(message)
        if op == "keep":
            return {"ok": True}
        if not self._holds:
            raise InputError("the device is not held", where=str(op)[:40], expected="`hold` before it")
        if op == "release":
            self._holds, self._released = False, True
            self._server.leases.detach(orderly=True)  # before the answer: whoever has it finds the device free
            return {"ok": True}
        if op == "missing":
            digests = message.get("artifacts")
            return {"ok": True, "missing": self._server.uploads.missing(digests if isinstance(digests, list) else [])}
        if op == "put":
            return self._announce(message)
        if op == "file":
            return self._keep()
        if op == "measure":
            return {"ok": True, "latencies": self._server.measure(message, self._wire)}
        raise InputError("no such request", found=repr(op)[:40])

    def _hold(self, message: dict[str, Any]) -> dict[str, Any]:
        token, holder = message.get("token"), message.get("holder")
        if not isinstance(token, str) or not isinstance(holder, str) or not 16 <= len(token) <= _NAME_CHARACTERS:
            raise InputError("bad holder", expected="a token of 16 characters or more, and a name")
        if not self._holds:
            wait_s = _number(message, "wait_s", 0.0, _LONGEST_WAIT_S)
            shown = "".join(filter(str.isprintable, holder[:_NAME_CHARACTERS]))  # others see it on their terminals
            self._server.leases.attach(
                token, shown, wait_s, lambda now: self._wire.send({"beat": "waiting", "lease": now})
            )
            self._holds = True
        return {"ok": True}

    def _announce(self, message: dict[str, Any]) -> dict[str, Any]:
        digest, size = check_digest(message.get("sha256")), message.get("size")
        largest = min(self._server.limits.artifact_bytes, self._server.limits.cache_bytes)
        if type(size) is not int or not 0 < size <= largest:
            raise InputError(
                "the artifact is too large for the device",
                expected=f"at most {largest} bytes",
                found=f"{size!r:.40} bytes",
                hint="start `nas device serve` with a larger --max-artifact-mib and --max-cache-mib",
            )
        self._announced = digest, size
        return {"ok": True}

    def _open(self, message: Any, size: int) -> Take:
        if self._announced is None or message.get("op") != "file" or size != self._announced[1]:
            raise InputError("a file that was not announced", expected="`put` with its digest and size before it")
        self._upload = self._server.uploads.begin(self._announced[0], size)
        return self._upload.take

    def _keep(self) -> dict[str, Any]:
        if self._upload is None:
            raise InputError("a file without bytes", where="file")
        upload, self._upload, self._announced = self._upload, None, None
        upload.finish()
        return {"ok": True}


def _require_runtime() -> None:
    """Load the TVM runtime, in the worker: what is missing is said before anybody connects."""
    tvm_runtime.load()


def _measure(paths: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure in the worker, with the function that measures everywhere."""
    return [latency.to_dict() for latency in measure.measure_together(paths, **options)]


def _gpu_timing(given: Any) -> GpuTiming:
    known = {field.name for field in fields(GpuTiming)}
    if not isinstance(given, dict) or set(given) != known or not all(isinstance(item, bool) for item in given.values()):
        raise InputError("bad gpu", expected=f"true or false for {', '.join(sorted(known))}", found=repr(given)[:80])
    return GpuTiming(**given)


def _number(message: Mapping[str, Any], name: str, least: float, most: float) -> float:
    value = message.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InputError(f"bad {name}", expected=f"{least:g} to {most:g}", found=repr(value)[:40])
    return value
