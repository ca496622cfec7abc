"""A device and its searchers, on loopback, with made-up measurements: who gets it, and what lost connections cost."""

from __future__ import annotations

import hashlib
import queue
import random
import shutil
import socket
import subprocess
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from codegen.devices import client
from codegen.devices.client import Device
from codegen.devices.serve import _tls
from codegen.devices.server import Limits
from codegen.devices.wire import Wire, WireError, checked, greet_device
from codegen.gpu.cuda.timing import GpuTiming
from ir.errors import InputError, KernelCrash, MeasurementError, TargetUnavailable
from tests.codegen.fake_device import LONG_S, FakeWorker, Network, device_at, serving

SECRET = b"0123456789abcdef"


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model.nas"
    path.write_bytes(b"x" * 700)
    return path


def test_a_measurement_names_its_device_and_sends_each_artifact_once(tmp_path, model):
    """The record is the device's; the second time the file is there already."""
    worker, other = FakeWorker(), tmp_path / "other.nas"
    other.write_bytes(b"y" * 900)
    with serving(tmp_path / "cache", worker, secret=SECRET) as (server, port):
        device = device_at(port, secret=SECRET)
        one, two = device.measure_together([model, other])
        assert (one.median_ms, two.median_ms) == (700.0, 900.0)
        assert one.machine == {"cpu": "made up", "device": f"board (127.0.0.1:{port})"}
        assert server.uploads.describe()["files"] == 2
        before = {path: path.stat().st_ino for path in (tmp_path / "cache").iterdir()}
        assert device.measure_latency(model).median_ms == 700.0
        assert {path: path.stat().st_ino for path in (tmp_path / "cache").iterdir()} == before
    assert worker.seen[1] == [hashlib.sha256(model.read_bytes()).hexdigest()]


def test_a_gpu_is_timed_as_asked(tmp_path, model):
    """What concerns the GPU travels with the request, and is checked."""
    worker = FakeWorker()
    with serving(tmp_path / "cache", worker) as (_, port):
        device = device_at(port)
        device.measure_latency(model, gpu=GpuTiming(flush_cache=True))
        device.measure_latency(model)
        wire, end = connected(port)
        ask(wire, {**HOLD, "wait_s": LONG_S})  # the device's lease may yet be on its way back
        asked = {"op": "measure", "artifacts": [hashlib.sha256(model.read_bytes()).hexdigest()], **FEW}
        with pytest.raises(InputError, match="bad gpu"):
            ask(wire, {**asked, "gpu": {"flush_cache": 1, "graph": True}})
        end.close()
    assert [options.get("gpu") for options in worker.asked] == [GpuTiming(flush_cache=True), None]


def test_a_report_says_what_the_device_is_and_who_has_it(tmp_path):
    """Asking does not take it."""
    with serving(tmp_path / "cache") as (_, port):
        device = device_at(port)
        report = device.report()
        assert (report.name, report.lease) == ("board", None)
        assert report.threads >= 1
        with device.hold(), device.hold():
            lease = device.report().lease
            assert lease is not None
            assert lease["connected"] or lease["holder"]
        assert device.report().lease is None


@pytest.mark.parametrize("own", [b"another secret of the same kind", None])
def test_who_does_not_know_the_secret_is_refused_at_once(tmp_path, model, own):
    """It is no matter of waiting, and others are served on."""
    with serving(tmp_path / "cache", secret=SECRET) as (_, port):
        with pytest.raises(InputError, match="secret"):
            device_at(port, secret=own).measure_latency(model)
        assert device_at(port, secret=SECRET).measure_latency(model).median_ms == 700.0


def test_one_searcher_at_a_time(tmp_path, model):
    """The other is told who has the device, and gets it after that."""
    told: queue.Queue[str] = queue.Queue()
    with serving(tmp_path / "cache") as (_, port):
        first, second = device_at(port), device_at(port, tell=told.put)
        with first.hold():
            with pytest.raises(TargetUnavailable, match="in use") as raised:
                device_at(port, wait_s=0.0).measure_latency(model)
            assert "@" in str(raised.value.found)
            assert first.measure_latency(model).median_ms == 700.0
            results: list[float] = []
            waiting = threading.Thread(target=lambda: results.append(second.measure_latency(model).median_ms))
            waiting.start()
            assert "who has the device since" in told.get(timeout=LONG_S)
            assert results == []
        waiting.join(LONG_S)
        assert results == [700.0]


def test_processes_of_one_holder_share_its_lease(tmp_path, model):
    """So workers of a search measure while its driver holds the device."""
    with serving(tmp_path / "cache") as (_, port):
        device = device_at(port)
        with device.hold():
            worker = replace(device, wait_s=0.0)
            assert worker.measure_latency(model).median_ms == 700.0


@pytest.mark.parametrize("losses", [1, 2])
def test_a_measurement_whose_connection_is_lost_is_begun_anew(tmp_path, model, losses):
    """The device stops the one that nobody waits for; the record says how often it was tried."""

    def script(worker: FakeWorker, time: int) -> None:
        if time <= losses:
            worker.hang()

    worker = FakeWorker(script)
    with serving(tmp_path / "cache", worker) as (_, port):
        network = Network(port)
        results = []
        thread = threading.Thread(target=lambda: results.append(device_at(network.port).measure_latency(model)))
        thread.start()
        for _ in range(losses):
            assert worker.begun.acquire(timeout=LONG_S)
            network.cut()
        thread.join(LONG_S)
        network.close()
    assert results[0].median_ms == 700.0
    assert results[0].machine["tries"] == losses + 1


def test_a_model_under_which_the_device_goes_away_again_and_again_fails_alone(tmp_path, model):
    """An error of the trial, not of the study: the device is there for the next one."""
    network: list[Network] = []

    def script(worker: FakeWorker, time: int) -> None:
        if time <= client.TRIES:
            network[0].cut()
            worker.hang()

    with serving(tmp_path / "cache", FakeWorker(script)) as (_, port):
        network.append(Network(port))
        device = device_at(network[0].port)
        with pytest.raises(MeasurementError, match="went away 3 times"):
            device.measure_latency(model)
        assert device.measure_latency(model).median_ms == 700.0
        network[0].close()


def test_a_device_that_comes_back_is_measured_on(tmp_path, model):
    """A server that was ended and started again finds its searcher waiting."""
    told = threading.Event()
    with serving(tmp_path / "cache") as (_, port):
        device = device_at(port, tell=lambda _: told.set())
        assert device.measure_latency(model).median_ms == 700.0
    results: list[float] = []
    thread = threading.Thread(target=lambda: results.append(device.measure_latency(model).median_ms))
    thread.start()
    assert told.wait(LONG_S)
    with serving(tmp_path / "cache", port=port):
        thread.join(LONG_S)
    assert results == [700.0]


def test_a_device_that_stays_away_ends_the_study(tmp_path, model):
    """Nothing can be measured; the message says what to do."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(TargetUnavailable, match="cannot be reached") as raised:
        device_at(port, wait_s=0.0).measure_latency(model)
    assert "nas device serve" in str(raised.value)


def test_errors_of_a_measurement_are_those_of_measuring_here(tmp_path, model):
    """Their class says whether the trial or the study is meant."""

    def script(_worker: FakeWorker, _time: int) -> None:
        raise KernelCrash("measure_together ended its process", found="signal SIGSEGV")

    with (
        serving(tmp_path / "cache", FakeWorker(script)) as (_, port),
        pytest.raises(KernelCrash, match="SIGSEGV"),
    ):
        device_at(port).measure_latency(model)


def test_too_large_an_artifact_is_refused_before_it_is_sent(tmp_path, model):
    """The device says how much it takes."""
    with serving(tmp_path / "cache", limits=Limits(artifact_bytes=699)) as (_, port):
        with pytest.raises(InputError, match="too large") as raised:
            device_at(port).measure_latency(model)
        assert "699" in str(raised.value.expected)


def test_old_artifacts_go_when_there_are_too_many(tmp_path):
    """The bound holds, and what was removed is sent again."""
    with serving(tmp_path / "cache", limits=Limits(cache_bytes=2500)) as (server, port):
        for round_number in range(2):
            for letter in "abcd":
                path = tmp_path / f"{letter}.nas"
                path.write_bytes(letter.encode() * 1000)
                assert device_at(port).measure_latency(path).median_ms == 1000.0, round_number
                assert server.uploads.describe()["bytes"] <= 2500


def connected(port: int) -> tuple[Wire, socket.socket]:
    end = socket.create_connection(("127.0.0.1", port))
    wire = Wire(end)
    greet_device(wire, None, b"")
    return wire, end


def ask(wire: Wire, message: dict, body: bytes = b"") -> dict:
    wire.send(message, [body], len(body))
    while "beat" in (answer := wire.receive(LONG_S)):
        pass
    return checked(answer)


HOLD = {"op": "hold", "token": "t" * 16, "holder": "test", "wait_s": 0}
FEW = {"min_rounds": 10, "max_seconds": 1, "target_interval": 0.02}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"op": "measure"}], "not held"),
        ([{"op": "put"}], "not held"),
        ([{"op": "hold"}], "bad holder"),
        ([{**HOLD, "wait_s": "long"}], "bad wait_s"),
        ([{**HOLD, "token": "short"}], "bad holder"),
        ([HOLD, {"op": "shell"}], "no such request"),
        ([HOLD, {"op": ["put"]}], "no such request"),
        ([HOLD, {"op": "put", "sha256": "../../x", "size": 1}], "no such digest"),
        ([HOLD, {"op": "put", "sha256": "0" * 64, "size": -1}], "too large"),
        ([HOLD, {"op": "put", "sha256": "0" * 64, "size": True}], "too large"),
        ([HOLD, {"op": "missing", "artifacts": ["/etc/passwd"]}], "no such digest"),
        ([HOLD, {"op": "file"}], "without bytes"),
        ([HOLD, {"op": "measure", "artifacts": ["0" * 64], **FEW}], "not here"),
        ([HOLD, {"op": "measure", "artifacts": [], **FEW}], "bad list"),
        ([HOLD, {"op": "measure", "artifacts": ["0" * 64] * 17, **FEW}], "bad list"),
    ],
)
def test_requests_that_make_no_sense_are_refused(tmp_path, messages, reason):
    """Each with its reason, and the connection can be used on."""
    with serving(tmp_path / "cache") as (_, port):
        wire, end = connected(port)
        *before, last = messages
        for message in before:
            ask(wire, message)
        with pytest.raises(InputError, match=reason):
            ask(wire, last)
        assert ask(wire, {"op": "keep"}) == {"ok": True}
        end.close()


def test_a_file_that_is_another_than_announced_is_not_kept(tmp_path):
    """Nor one that was not announced, and nothing is left of them."""
    with serving(tmp_path / "cache") as (server, port):
        wire, end = connected(port)
        ask(wire, HOLD)
        ask(wire, {"op": "put", "sha256": "0" * 64, "size": 4})
        with pytest.raises(InputError, match="not what was announced"):
            ask(wire, {"op": "file"}, b"four")
        with pytest.raises(InputError, match="too large"):
            ask(wire, {"op": "file"}, b"more")
        end.close()
        assert server.uploads.describe()["files"] == 0
        assert list((tmp_path / "cache").iterdir()) == []


def test_connections_of_garbage_do_no_harm(tmp_path, model):
    """Some hundred, seeded: random bytes, and parts of messages with bytes changed; the device serves on."""
    rng = random.Random(0)
    with serving(tmp_path / "cache") as (_, port):
        for number in range(300):
            with socket.create_connection(("127.0.0.1", port)) as end:
                end.settimeout(LONG_S)
                data = bytearray(rng.randbytes(rng.randrange(1, 200)))
                if number % 2:
                    text = b'{"op": "begin", "version": 1, "nonce": "' + b"0" * 64 + b'"}'
                    data = bytearray(b"NAS1" + len(text).to_bytes(4, "big") + bytes(8) + text)
                    for _ in range(rng.randrange(1, 4)):
                        data[rng.randrange(len(data))] = rng.randrange(256)
                    del data[rng.randrange(1, len(data) + 1) :]
                with suppress(OSError):  # it may hang up before all was sent
                    end.sendall(data)
                    end.shutdown(socket.SHUT_WR)
                    while end.recv(1 << 12):
                        pass
        assert device_at(port).measure_latency(model).median_ms == 700.0


def test_requests_of_garbage_do_no_harm(tmp_path, model):
    """Behind the greeting too: values of other kinds in every place."""
    rng = random.Random(1)
    odd = [None, True, -1, 0, 1e300, "", "x" * 500, [], [None], {}, {"a": 1}, "0" * 64, ["0" * 64]]
    names = ["op", "token", "holder", "wait_s", "artifacts", "sha256", "size", "threads", "max_seconds", "min_rounds"]
    ops = ["status", "hold", "missing", "put", "file", "measure", "keep"]
    with serving(tmp_path / "cache") as (_, port):
        wire, end = connected(port)
        ask(wire, HOLD)
        for _ in range(300):
            message = {name: rng.choice(odd) for name in rng.sample(names, rng.randrange(len(names)))}
            with suppress(InputError):
                ask(wire, {**message, "op": rng.choice(ops)})
        end.close()
        assert device_at(port, token="t" * 16).measure_latency(model).median_ms == 700.0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[str, str]:
    """Make a certificate for 127.0.0.1 that signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, which makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    names = ("-subj", "/CN=board", "-addext", "subjectAltName=IP:127.0.0.1")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", *names]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return str(folder / "cert.pem"), str(folder / "key.pem")


def fingerprint(certificate: str) -> str:
    command = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", certificate]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().partition("=")[2]


def test_tls_trusts_a_certificate_or_its_fingerprint(tmp_path, model, certificate):
    """And the secret is proved over it."""
    with serving(tmp_path / "cache", secret=SECRET, tls=_tls(*certificate)) as (_, port):
        (tmp_path / "secret").write_bytes(SECRET)
        (tmp_path / "secret").chmod(0o600)
        for trusted in ({"tls_ca": certificate[0]}, {"tls_fingerprint": fingerprint(certificate[0])}):
            device = Device.of(f"127.0.0.1:{port}", secret_file=str(tmp_path / "secret"), wait_s=LONG_S, **trusted)
            assert device.measure_latency(model).median_ms == 700.0


def test_tls_refuses_what_is_not_trusted(tmp_path, model, certificate):
    """Another certificate, another fingerprint, or no TLS on one side: said at once, and nothing is sent."""
    with serving(tmp_path / "cache", tls=_tls(*certificate)) as (_, port):
        with pytest.raises(InputError, match="another device"):
            device_at(port, tls_fingerprint="0" * 64).measure_latency(model)
        with pytest.raises(TargetUnavailable):
            device_at(port, wait_s=0.0).measure_latency(model)
        assert device_at(port, tls_ca=certificate[0]).measure_latency(model).median_ms == 700.0
    with serving(tmp_path / "cache") as (_, port), pytest.raises(TargetUnavailable, match="TLS"):
        device_at(port, wait_s=0.0, tls_ca=certificate[0]).measure_latency(model)


def test_a_certificate_of_somebody_else_is_not_trusted(tmp_path, model, certificate):
    """Nor one that the system trusts."""
    with serving(tmp_path / "cache", tls=_tls(*certificate)) as (_, port):
        other = tmp_path / "other.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", "other.key", "-out", str(other), "-days", "2", "-subj", "/CN=127.0.0.1"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        with pytest.raises(InputError, match="not trusted"):
            device_at(port, tls_ca=str(other)).measure_latency(model)


def test_a_changed_message_is_no_measurement(tmp_path):
    """Somebody on the way who changes a byte behind the greeting ends the connection, no more."""
    with serving(tmp_path / "cache", secret=SECRET) as (_, port):
        end = socket.create_connection(("127.0.0.1", port))
        wire = Wire(end)
        greet_device(wire, SECRET, b"")
        wire._keys = (b"\0" * 32, wire._keys[1]) if wire._keys else None
        wire.send({"op": "status"})
        with pytest.raises(WireError):
            wire.receive(LONG_S)
        end.close()
