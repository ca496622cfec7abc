"""Worker processes: what goes wrong in one costs one request."""

import ctypes
import gc
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from codegen.workers import Channel, RemoteError, Worker
from ir.errors import DataError, KernelCrash, KernelTimeout

LONG_S = 60.0  # far above what any request here takes, so that a busy machine cannot fail a test


def end_by(signal_number: int) -> None:
    """Say something and die."""
    print("last words", flush=True)
    os.kill(os.getpid(), signal_number)


def dereference_null() -> None:
    """Do what broken generated code does."""
    ctypes.string_at(0)


def hang() -> None:
    """Sleep in C with the interpreter locked: no Python in this process can end it."""
    ctypes.PyDLL(None).sleep(1000)


def mark_and_hang(path: str) -> None:
    """Leave the process id in a file, then hang."""
    partial = Path(f"{path}.partial")
    partial.write_text(str(os.getpid()))
    partial.rename(path)
    hang()


def raise_data_error() -> None:
    """Raise one of this project's errors."""
    raise DataError("no such file", where="corpus.txt", hint="name another")


def exit_quietly() -> None:
    """Leave without an answer."""
    os._exit(7)


def return_unpicklable() -> Callable[[], None]:
    """Return what cannot travel."""
    return lambda: None


def is_loaded(module: str) -> bool:
    """Tell whether the process has imported a module."""
    return sys.modules.get(module) is not None


def is_running(pid: int) -> bool:
    """Tell whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker that is closed after the test."""
    with Worker() as running:
        yield running


def test_worker_survives_requests_and_errors(worker: Worker):
    """Results and exceptions come back; the process stays the same one."""
    assert worker.call(math.hypot, 3.0, 4.0, timeout_s=LONG_S) == 5.0
    pid = worker.pid
    assert pid != os.getpid()
    with pytest.raises(RemoteError, match="math domain error"):
        worker.call(math.sqrt, -1.0, timeout_s=LONG_S)
    assert worker.call(os.getpid, timeout_s=LONG_S) == pid


def test_worker_passes_project_errors_whole(worker: Worker):
    """An error of this project keeps its class and fields."""
    with pytest.raises(DataError) as caught:
        worker.call(raise_data_error, timeout_s=LONG_S)
    assert (caught.value.where, caught.value.hint) == ("corpus.txt", "name another")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGILL, signal.SIGABRT, signal.SIGKILL])
def test_worker_crash_names_signal_and_last_words(worker: Worker, number: signal.Signals):
    """A crash fails the request with the signal's name and what was printed; the next request works."""
    with pytest.raises(KernelCrash, match=rf"(?s){number.name}.*last words"):
        worker.call(end_by, int(number), timeout_s=LONG_S)
    assert worker.call(math.sqrt, 4.0, timeout_s=LONG_S) == 2.0


def test_worker_survives_wild_pointer(worker: Worker):
    """A real segmentation fault is a KernelCrash."""
    with pytest.raises(KernelCrash, match="SIGSEGV"):
        worker.call(dereference_null, timeout_s=LONG_S)


def test_worker_exit_names_status(worker: Worker):
    """A process that leaves by itself is a crash too."""
    with pytest.raises(KernelCrash, match="exit status 7"):
        worker.call(exit_quietly, timeout_s=LONG_S)


def test_worker_hang_is_killed(worker: Worker):
    """A hang is cut at the limit, the process is gone, the next request works."""
    worker.start()
    pid = worker.pid
    assert pid is not None
    with pytest.raises(KernelTimeout, match="hang"):
        worker.call(hang, timeout_s=0.2)
    assert not Path(f"/proc/{pid}").exists()
    assert worker.call(math.sqrt, 4.0, timeout_s=LONG_S) == 2.0


def test_worker_collects_no_garbage_among_modules(worker: Worker):
    """What was imported before the first request is in no collection, which would otherwise take long with TVM."""
    assert worker.call(gc.get_freeze_count, timeout_s=LONG_S) > 0


def test_worker_result_that_cannot_travel_fails_its_request(worker: Worker):
    """A result that cannot be pickled fails that request and no other."""
    with pytest.raises(KernelCrash, match="pickle"):
        worker.call(return_unpicklable, timeout_s=LONG_S)
    assert worker.call(math.sqrt, 4.0, timeout_s=LONG_S) == 2.0


def test_worker_sets_environment_affinity_and_modules():
    """The process has the variables, CPUs and modules that were asked for."""
    cpu = max(os.sched_getaffinity(0))
    options = {"environment": {"TVM_NUM_THREADS": "1"}, "preload": ["colorsys"], "without": ["turtle"]}
    with Worker(cpus=[cpu], **options) as worker:
        assert worker.call(os.sched_getaffinity, 0, timeout_s=LONG_S) == {cpu}
        assert worker.call(os.getenv, "TVM_NUM_THREADS", timeout_s=LONG_S) == "1"
        assert worker.call(is_loaded, "colorsys", timeout_s=LONG_S)
        with pytest.raises(RemoteError, match="turtle"):
            worker.call(__import__, "turtle", timeout_s=LONG_S)


def test_worker_close_leaves_no_process(worker: Worker):
    """After closing there is no process, not even a zombie."""
    pid = worker.call(os.getpid, timeout_s=LONG_S)
    worker.close()
    assert not Path(f"/proc/{pid}").exists()
    assert worker.pid is None


def test_worker_dies_with_killed_parent(tmp_path: Path):
    """When the parent is killed, a worker stuck in generated code does not outlive it."""
    mark = tmp_path / "pid"
    script = (
        "import sys; from codegen.workers import Worker; from tests.codegen import test_workers as t;"
        "Worker().call(t.mark_and_hang, sys.argv[1], timeout_s=1000)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen([sys.executable, "-c", script, str(mark)], env=environment)
    wait_until(mark.exists)
    pid = int(mark.read_text())
    assert is_running(pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(pid))


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a socket."""
    ends = tuple(Channel(end) for end in socket.socketpair())
    yield ends[0], ends[1]
    for end in ends:
        end.close()


@pytest.mark.parametrize("size", [0, 1, 1000, 1 << 14, (1 << 14) + 3, 3_000_001])
def test_channel_carries_arrays_of_any_size(channels: tuple[Channel, Channel], size: int) -> None:
    """Arrays, contiguous or not, arrive as they were, and large ones writable and aligned for generated code."""
    near, far = channels
    sent = {
        "plain": np.arange(size, dtype=np.float32),
        "strided": np.arange(2 * size, dtype=np.int32)[::2],
        "turned": np.arange(6 * size, dtype=np.float64).reshape(2, 3, size).T,
        "text": "x" * size,
    }
    with ThreadPoolExecutor(1) as sender:  # a socket holds less than this
        sender.submit(near.send, sent)
        found = far.receive()
    assert found["text"] == sent["text"]
    for name in ("plain", "strided", "turned"):
        np.testing.assert_array_equal(found[name], sent[name])
        assert found[name].dtype == sent[name].dtype
    if size >= 1 << 14:
        assert found["plain"].ctypes.data % 64 == 0
        found["plain"][0] = -1


def test_channel_tells_of_a_peer_that_died_while_sending(channels: tuple[Channel, Channel]) -> None:
    """A message that was cut short is no answer."""
    near, far = channels
    assert not far.poll(0.01)
    near._socket.sendall((1).to_bytes(8, "little") + (1000).to_bytes(8, "little") + b"only this")
    near.close()
    assert far.poll(1.0)
    with pytest.raises(EOFError):
        far.receive()


def test_worker_started_by_two_threads_is_one_process():
    """The second waits until the process that the first one starts is ready."""
    with Worker() as worker, ThreadPoolExecutor(2) as threads:
        one, two = (threads.submit(lambda: (worker.start(), worker.pid)[1]) for _ in range(2))
        assert one.result() == two.result() == worker.call(os.getpid, timeout_s=LONG_S)


def test_worker_that_cannot_be_prepared_says_so_each_time():
    """A start that failed, maybe unheard, leaves no process that later requests would meet unprepared."""
    with Worker(preload=("no_such_module",)) as worker:
        for _ in range(2):
            with pytest.raises(RemoteError, match="the start of a worker"):
                worker.call(os.getpid, timeout_s=LONG_S)
            assert worker.pid is None
