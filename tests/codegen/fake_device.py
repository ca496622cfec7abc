"""Devices for tests: a server in this process whose measurements are made up, and a network that can be cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from codegen.devices import client
from codegen.devices import server as server_module
from codegen.devices.client import Device
from codegen.devices.server import Limits, Server
from codegen.measure import Latency
from ir.errors import KernelCrash

LONG_S = 60.0
"""Bound on waits that end at once unless something is wrong."""


def latency(median_ms: float) -> dict[str, Any]:
    """Make up a record."""
    interval = (median_ms, median_ms)
    return Latency(median_ms, 1.0, 1.0, interval, 30, 1, 0.1, 1.0, False, "", 1.0, {"cpu": "made up"}).to_dict()


class FakeWorker:
    """Measures a file as one millisecond for each of its bytes; `script` may do something else instead.

    Attributes:
        begun: Released once for each measurement that begins.
        killed: Set once the process was killed.
        seen: Names of the files of each measurement.
        asked: Keywords of each.
    """

    def __init__(self, script: Callable[[FakeWorker, int], None] | None = None) -> None:
        self.begun, self.killed = threading.Semaphore(0), threading.Event()
        self.seen: list[list[str]] = []
        self.asked: list[dict[str, Any]] = []
        self._script = script

    def call(self, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
        if not arguments:
            return None
        paths: list[str] = arguments[0]
        self.seen.append([Path(path).stem for path in paths])
        self.asked.append(arguments[1])
        self.begun.release()
        if self._script is not None:
            self._script(self, len(self.seen))
        return [latency(float(Path(path).stat().st_size)) for path in paths]

    def hang(self) -> None:
        """Measure until killed."""
        assert self.killed.wait(LONG_S)
        self.killed.clear()
        raise KernelCrash("killed")

    def kill(self) -> None:
        self.killed.set()


@contextmanager
def serving(folder: Path, worker: FakeWorker | None = None, **options: Any) -> Iterator[tuple[Server, int]]:
    """Run a server on a free port, or `port`, of this machine; it notices lost connections soon.

    Yields:
        The server and its port.
    """
    listener = socket.create_server(("127.0.0.1", options.pop("port", 0)))
    worker = worker or FakeWorker()
    server = Server(listener, "board", folder, worker=worker, limits=options.pop("limits", Limits()), **options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        with mock.patch.object(server_module, "BEAT_S", 0.05), mock.patch.object(client, "_FIRST_PAUSE_S", 0.02):
            yield server, listener.getsockname()[1]
    finally:
        server.close()
        thread.join(LONG_S)


def device_at(port: int, **fields: Any) -> Device:
    """Return a device of this machine."""
    return Device("127.0.0.1", port, **{"wait_s": LONG_S, **fields})


class Network:
    """Carries connections on to a port, until `cut`."""

    def __init__(self, port: int) -> None:
        self._to, self._ends = port, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def cut(self) -> None:
        """Close every connection that there is; new ones are carried."""
        ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        """Carry nothing any more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                return
            self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_carry, args=(source, sink), daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
