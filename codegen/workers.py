"""Isolated worker processes: generated code that crashes or hangs costs one request, never the caller.

A `Worker` is a fresh Python process that imports its libraries once and then serves requests, one at a time, over a
socket pair: `(function, arguments)` in, `(status, value)` out, pickled, large arrays as they lie in memory. Functions
travel by reference, so they must be importable module-level functions. When a request kills the process or runs out of
time, the next request starts a new process. A worker dies with its parent, whatever kills that, even in the middle of
generated code: it holds the read end of a pipe that it never reads and asks the kernel for a signal when the write end
closes.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import importlib
import mmap
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import Lock
from types import TracebackType
from typing import IO, Any

from ir.errors import KernelCrash, KernelTimeout, NasError, StorageError

_START_TIMEOUT_S = 120.0  # importing TVM takes 1-2 s on a quiet machine; this only bounds a broken installation
_LOG_TAIL_CHARACTERS = 2000
_BESIDE_BYTES = 1 << 16  # arrays from this size on travel outside the pickle: a copy less on each side
_ALIGNMENT_BYTES = 64  # of arrays that arrive: generated code may take them where they lie
_FULL_BELOW_BYTES = 1 << 16  # LLVM ends its process, without a word that can be caught, when a file has no room


class RemoteError(NasError):
    """A function raised in a worker something that is not one of this project's errors."""


class Worker:
    """One process that runs functions for this one, restarted when it dies.

    Args:
        cpus: CPUs that the process is pinned to; all when None.
        environment: Variables set in the process before any library loads, e.g. `TVM_NUM_THREADS`.
        preload: Modules imported before the first request, so that their import is in no request's time.
        without: Modules that cannot be imported in the process, though they are installed.
    """

    def __init__(
        self,
        *,
        cpus: Sequence[int] | None = None,
        environment: Mapping[str, str] | None = None,
        preload: Sequence[str] = (),
        without: Sequence[str] = (),
    ) -> None:
        self._cpus = tuple(cpus or ())
        self._environment = dict(environment or {})
        self._preload = tuple(preload)
        self._without = tuple(without)
        self._live: _Process | None = None
        self._starting = Lock()

    @property
    def pid(self) -> int | None:
        """Process id, None while no process runs."""
        return self._live.popen.pid if self._live else None

    def start(self) -> None:
        """Start the process and import the preloaded modules; nothing happens when it runs already.

        A thread that calls this while another one does waits until the process is ready.
        """
        with self._starting:
            if self._live is not None:
                return
            self._live = _Process(self._cpus, self._environment)
            try:
                self._exchange((_prepare, (self._preload, self._without)), "the start of a worker", _START_TIMEOUT_S)
            except BaseException:
                self.close()  # the next start must not find a process that lacks its modules
                raise

    def call(self, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
        """Run `function(*arguments)` in the process and return its result.

        Args:
            function: Importable module-level function.
            arguments: Picklable arguments.
            timeout_s: The process is killed when the call takes longer; starting it does not count.

        Raises:
            KernelCrash: The process ended during the call.
            KernelTimeout: The call took too long.
            StorageError: There was no room for its temporary files.
            RemoteError: The function raised; its own NasError is raised as it was.
        """
        self.start()
        return self._exchange((function, arguments), function.__name__, timeout_s)

    def close(self) -> None:
        """End the process; a later call starts a new one."""
        if self._live is not None:
            self._live.kill()
            self._live = None

    def kill(self) -> None:
        """Kill the process from another thread than the one that waits for it, which then hears of a crash."""
        if (live := self._live) is not None:
            with suppress(ProcessLookupError):
                os.killpg(live.popen.pid, signal.SIGKILL)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _exchange(self, request: tuple[Callable[..., Any], tuple[Any, ...]], name: str, timeout_s: float) -> Any:
        assert self._live is not None
        try:
            status, value = self._live.exchange(request, timeout_s)
        except TimeoutError:
            self.close()
            raise KernelTimeout(
                f"{name} ran out of time", expected=f"at most {timeout_s:g} s", hint="raise the limit, or leave it out"
            ) from None
        except (EOFError, ConnectionError):
            reason = self._live.obituary()
            self.close()
            if shutil.disk_usage(tempfile.gettempdir()).free < _FULL_BELOW_BYTES:
                raise _no_room(name, reason) from None
            raise KernelCrash(f"{name} ended its process", found=reason) from None
        except BaseException:
            self.close()  # interrupted between question and answer: the next question must not get this one's answer
            raise
        if status == "ok":
            return value
        if isinstance(value, NasError):
            raise value
        if os.strerror(errno.ENOSPC) in value:
            raise _no_room(name, value)
        raise RemoteError(f"{name} failed in a worker process", found=value)


class Channel:
    """One end of a socket that carries objects.

    A message is its head (number of parts, bytes of each), the pickle, and then the memory of each large array.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: object) -> None:
        """Send an object.

        Raises:
            ConnectionError: The other end is closed.
        """
        beside: list[memoryview] = []

        def stays(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes >= _BESIDE_BYTES:
                beside.append(raw)
            return raw.nbytes < _BESIDE_BYTES

        parts = [memoryview(pickle.dumps(message, protocol=5, buffer_callback=stays)), *beside]
        self._socket.sendall(struct.pack(f"<{len(parts) + 1}Q", len(parts), *(part.nbytes for part in parts)))
        for part in parts:
            self._socket.sendall(part)

    def poll(self, timeout_s: float) -> bool:
        """Wait for something to receive, the end included, and return whether it came in time."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout_s * 1e3))

    def receive(self) -> Any:
        """Return the next object; its large arrays are writable and share one block of memory.

        Raises:
            EOFError: The other end is closed.
        """
        (count,) = struct.unpack("<Q", self._read(8))
        sizes = struct.unpack(f"<{count}Q", self._read(8 * count))
        starts, end = [0], 0
        for size in sizes:
            end += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            starts.append(end)
        block = mmap.mmap(-1, end, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)  # else the kernel takes longer to find the memory than the socket to fill it
        memory = memoryview(block)
        parts = [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        for part in parts:
            self._read_into(part)
        return pickle.loads(parts[0], buffers=parts[1:])

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        self._read_into(memoryview(data))
        return data

    def _read_into(self, memory: memoryview) -> None:
        while memory:
            count = self._socket.recv_into(memory)
            if count == 0:
                raise EOFError
            memory = memory[count:]


class _Process:
    """The parent's side of one process."""

    def __init__(self, cpus: tuple[int, ...], environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        lifeline, self._lifeline = os.pipe()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        modules = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # Without the working folder that `-c` puts first: what lies there by chance is none of our modules.
        command = "import sys; sys.path[:] = filter(None, sys.path)\n"
        command += "from codegen.workers import serve; serve(*map(int, sys.argv[1:]))"
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-c", command, str(theirs.fileno()), str(lifeline), *map(str, cpus)],
                env={**os.environ, "PYTHONPATH": modules, **environment},
                pass_fds=(theirs.fileno(), lifeline),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # the parent decides what an interrupt means, not the terminal
            )
        finally:
            theirs.close()
            os.close(lifeline)

    def exchange(self, request: object, timeout_s: float) -> tuple[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            TimeoutError: No answer in time.
            EOFError: The process ended instead of answering.
        """
        self._channel.send(request)
        if not self._channel.poll(timeout_s):
            raise TimeoutError
        return self._channel.receive()

    def obituary(self) -> str:
        """Say how the process ended and what it printed last."""
        code = self.popen.wait()
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_TAIL_CHARACTERS))
        log = self._log.read().decode(errors="replace").strip()
        return f"{reason}, after printing: {log}" if log else reason

    def kill(self) -> None:
        """End the process, with everything it started, and leave no zombie."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self._channel.close()
        with suppress(OSError):
            os.close(self._lifeline)
        self._log.close()


def _no_room(name: str, found: str) -> StorageError:
    return StorageError(
        f"{name} had no room for its files",
        where=tempfile.gettempdir(),
        found=found,
        hint="make room there, or set TMPDIR to a folder with room",
    )


def serve(connection_fd: int, lifeline_fd: int, *cpus: int) -> None:
    """Answer requests until the parent is gone: the entry point of a worker process.

    Args:
        connection_fd: Socket of requests and answers.
        lifeline_fd: Pipe whose write end only the parent holds.
        cpus: CPUs to stay on; all when none is named.
    """
    _die_with_parent(lifeline_fd)
    if cpus:
        os.sched_setaffinity(0, cpus)
    channel = Channel(socket.socket(fileno=connection_fd))
    while True:
        try:
            function, arguments = channel.receive()
        except EOFError:
            return
        except (AttributeError, ImportError):
            answer = ("error", traceback.format_exc())  # the function is not importable here
        else:
            answer = _answer(function, arguments)
            del arguments
        channel.send(answer)
        del answer  # memory that the next request may need


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "ok", function(*arguments)
    except NasError as error:
        return "error", error
    except Exception:  # noqa: BLE001  # whatever the function raises is the caller's to judge, and this process serves on
        return "error", traceback.format_exc(limit=-3)


def _die_with_parent(lifeline_fd: int) -> None:
    """Have the kernel kill this process when the write end of the pipe closes, be it in Python or in generated code."""
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)


def _prepare(preload: Sequence[str], without: Sequence[str]) -> None:
    gc.disable()  # modules stay: a collection that walks through TVM and torch takes a fifth of a second
    for module in without:
        sys.modules[module] = None  # pyright: ignore[reportArgumentType]  # how Python itself marks a module as absent
    for module in preload:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
