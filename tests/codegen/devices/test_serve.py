"""`nas device serve` as a process: what it needs, what it refuses, and that it measures."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from codegen import machine
from codegen.compile import compile_graph
from codegen.devices import serve
from codegen.devices.client import Device
from codegen.devices.report import Report
from codegen.devices.serve import _listen, read_secret
from codegen.devices.targets import target_of
from codegen.targets import cpu
from ir.builder import Builder
from ir.errors import ArtifactError, InputError, TargetUnavailable
from tests.codegen import tiny_artifact

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "ray", "networkx", "typer", "rich", "pydantic", "yaml", "safetensors", "sklearn", "scipy", "msgspec")
_STUB = "raise ImportError('not on a device')\n"


@contextmanager
def process(
    folder: Path, *options: str, program: tuple[str, ...] = ("-m", "nas", "device", "serve")
) -> Iterator[tuple]:
    """Run a server in a process that can import numpy and TVM's runtime, and nothing else that is heavy."""
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    for name in HEAVY:
        (stubs / f"{name}.py").write_text(_STUB)
    import tvm

    compiler = stubs / "tvm"
    if not compiler.exists():
        compiler.mkdir()
        (compiler / "__init__.py").write_text(_STUB)
        (compiler / "lib").symlink_to(Path(tvm.__file__).parent / "lib")
    command = [sys.executable, *program, "--port", "0", "--cache", str(folder / "cache"), *options]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(stubs), str(ROOT)])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables, cwd=folder) as server:
        try:
            assert server.stdout is not None
            yield server, server.stdout.readline().split(" listens on ")[1].split(" ")[0]
        finally:
            server.kill()


def test_a_device_measures_without_torch_and_compiler(tmp_path):
    """The record is that of measuring here, from a process where those cannot be imported; it ends when told to."""
    path = tiny_artifact.make().save(tmp_path / "tiny.nas")
    with process(tmp_path, "--name", "board") as (server, address):
        device = Device.of(address)
        latency = device.measure_latency(path, threads=1, max_seconds=0.2)
        assert latency.threads == 1
        assert 0 < latency.interval_ms[0] <= latency.median_ms <= latency.interval_ms[1]
        assert latency.machine["device"] == f"board ({address})"
        assert latency.machine["features"] == device.report().machine["features"]
        elsewhere = tiny_artifact.with_target(tiny_artifact.make(), architecture="riscv64").save(tmp_path / "other.nas")
        with pytest.raises(ArtifactError, match="another processor"):
            device.measure_latency(elsewhere, threads=1, max_seconds=0.2)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


@pytest.mark.slow
def test_a_server_killed_while_it_measures_is_waited_for(tmp_path):
    """A new one on the same port gets the artifact and the measurement."""
    path = tiny_artifact.make().save(tmp_path / "tiny.nas")
    with process(tmp_path) as (server, address):
        told = threading.Event()
        device = Device.of(address).telling(lambda _: told.set())
        results = []
        thread = threading.Thread(
            target=lambda: results.append(
                device.measure_together([path], threads=1, min_rounds=1000, max_seconds=3.0)[0].median_ms
            )
        )
        thread.start()
        while not list((tmp_path / "cache").glob("*.nas")):
            assert thread.is_alive()
        server.kill()
        assert told.wait(60)
    with process(tmp_path, "--port", address.rpartition(":")[2]):
        thread.join(120)
    assert len(results) == 1


def test_beyond_this_machine_it_listens_with_a_secret_alone(tmp_path):
    """Artifacts are programs: who can connect can run anything."""
    for host in ("0.0.0.0", "::"):
        with pytest.raises(InputError, match="without a secret"):
            _listen(host, 0, False)
    assert serve.main(["--host", "0.0.0.0", "--port", "0", "--cache", str(tmp_path)]) == 2
    _listen("127.0.0.1", 0, False).close()
    _listen("0.0.0.0", 0, True).close()
    with pytest.raises(InputError, match="no such port"):
        _listen("127.0.0.1", 1 << 17, True)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(TargetUnavailable, match="cannot listen"):
        _listen("127.0.0.1", taken.getsockname()[1], True)


def test_secrets_come_from_a_private_file_or_the_environment(tmp_path):
    """Never from the command line, which others on the machine see."""
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o644)
    with pytest.raises(InputError, match="others can read"):
        read_secret(str(path), {})
    path.chmod(0o600)
    secret = b"0123456789abcdef"
    assert read_secret(str(path), {}) == secret
    assert read_secret(None, {"NAS_DEVICE_SECRET_FILE": str(path)}) == secret
    assert read_secret(None, {"NAS_DEVICE_SECRET": secret.decode()}) == secret
    assert read_secret(None, {}) is None
    with pytest.raises(InputError, match="cannot read"):
        read_secret(str(tmp_path / "none"), {})


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("board:99", "board", 99), ("board", "board", 7431), ("[::1]:99", "::1", 99), ("[::1]", "::1", 7431)],
)
def test_addresses_are_read(text, host, port):
    device = Device.of(text)
    assert (device.host, device.port) == (host, port)


@pytest.mark.parametrize("text", ["", ":99", "board:0", "board:x", "board:99999"])
def test_bad_addresses_are_refused(text):
    with pytest.raises(InputError, match="address"):
        Device.of(text)


def report(architecture: str, *features: str, threads: int = 4) -> Report:
    machine = {"cpu": "another", "architecture": architecture, "features": features, "logical_cpus": threads}
    return Report("board", machine, None, {}, 1)


SSE = ("popcnt", "sse4_1", "sse4_2", "ssse3")


def test_the_target_of_a_device_is_what_it_has():
    """Its level and its CPUs, not those of this machine."""
    old = target_of(report("x86_64", *SSE))
    assert (old.isa.name, old.threads, old.isa.threads, old.mcpu) == ("sse", 4, 4, "x86-64-v2")
    arm = target_of(report("aarch64", "asimd", "asimddp", "asimdhp", threads=8), threads=2)
    assert (arm.name, arm.threads, arm.triple) == ("arm64", 2, "aarch64-linux-gnu")
    assert set(arm.features) == {"asimd", "asimddp", "asimdhp"}


@pytest.mark.parametrize(
    ("found", "spec", "threads", "error"),
    [
        (report("x86_64", *SSE), "cpu:avx512", None, TargetUnavailable),
        (report("x86_64", *SSE), "arm64", None, TargetUnavailable),
        (report("aarch64", "asimd"), "arm64:dotprod", None, TargetUnavailable),
        (report("riscv64"), "cpu", None, TargetUnavailable),
        (report("x86_64", *SSE), "cpu", 5, InputError),
        (report("x86_64"), "cpu", None, TargetUnavailable),
    ],
)
def test_a_target_that_the_device_does_not_run_is_refused(found, spec, threads, error):
    """Before anything is compiled for it."""
    with pytest.raises(error):
        target_of(found, spec, threads)


def test_code_for_more_than_this_processor_has_is_made_and_not_run(monkeypatch):
    """The device's self-test holds it against torch's outputs."""
    if platform.machine() != "x86_64":
        pytest.skip("levels are of x86-64")
    flags = next(level[1] for level in cpu.LEVELS if level[0].name == "avx2")
    host = machine.cpu_features()
    monkeypatch.setattr(machine, "cpu_features", lambda: host - {"avx2"})
    target = target_of(report("x86_64", *flags))
    assert (target.isa.name, target.is_foreign, target.mcpu) == ("avx2", True, "x86-64-v3")
    b = Builder()
    artifact = compile_graph(b.build(y=b.relu(b.input("x", (4, 8)))), {}, target)
    assert artifact.verification_error is None
    assert "avx2" in artifact.unverified
