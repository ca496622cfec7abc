"""Bundles: what is in them is what runs an artifact, and nothing that a device has not got."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from codegen import bundle, cross, runtime
from codegen.bundle import collect, write_bundle
from ir.errors import InputError, TargetUnavailable
from tests.codegen import tiny_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    return tiny_artifact.make().save(tmp_path_factory.mktemp("bundle") / "tiny.nas")


def test_a_bundle_holds_artifact_runtime_and_the_modules_that_loading_imports(tmp_path, artifact):
    """The same content gives the same bytes; it is far below the bound."""
    written = write_bundle([artifact], tmp_path / "b.tar.gz")
    assert written.size_bytes == written.path.stat().st_size < bundle.LARGEST_BYTES / 4
    with tarfile.open(written.path) as archive:
        names = set(archive.getnames())
        packed = archive.extractfile("b/artifacts/tiny.nas")
        assert packed is not None
        assert packed.read() == artifact.read_bytes()
    for name in ("run.py", "lib/native/libtvm_runtime.so", "lib/native/libtvm_ffi.so", "lib/codegen/workers.py"):
        assert f"b/{name}" in names
    again = write_bundle([artifact], tmp_path / "again" / "b.tar.gz").path
    assert again.read_bytes() == written.path.read_bytes()


def test_nothing_that_a_device_lacks_is_imported_at_the_top_of_what_is_packed(artifact):
    """Modules of the standard library, numpy, and what is packed itself; the rest is imported where it is needed."""
    sources = collect([artifact])["python"]
    own = {name.removeprefix("lib/").removesuffix(".py").replace("/", ".") for name in sources}
    allowed = {*sys.stdlib_module_names, "numpy", "codegen", "ir"}
    for name, source in sources.items():
        if name.endswith(".py"):
            for module in bundle._imports(source):
                assert module.split(".")[0] in allowed, name
    assert {"codegen.measure", "codegen.devices.server", "codegen.tvm_ctypes"} <= own
    assert not {"codegen._tvm", "codegen.lower", "codegen.compile", "codegen.torch_backend"} & own


def test_too_large_a_bundle_is_refused_with_its_largest_part(tmp_path, artifact):
    """And nothing is written."""
    with pytest.raises(InputError, match="too large") as raised:
        write_bundle([artifact], tmp_path / "b.tar.gz", largest_bytes=1 << 20)
    assert "runtime" in str(raised.value.found)
    assert "libtvm_runtime.so" in str(raised.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_artifacts_that_do_not_go_together_are_refused(tmp_path, artifact, monkeypatch):
    """Two of one name, two processors, a system without a runtime, or a processor whose runtime is not here."""
    tiny = tiny_artifact.make()
    arm = tiny_artifact.with_target(tiny, architecture="aarch64", triple="aarch64-linux-gnu").save(tmp_path / "a.nas")
    phone = tiny_artifact.with_target(tiny, triple="aarch64-linux-android").save(tmp_path / "p.nas")
    with pytest.raises(InputError, match="bad artifacts"):
        collect([artifact, artifact])
    with pytest.raises(InputError, match="one processor"):
        collect([artifact, arm])
    with pytest.raises(TargetUnavailable, match="Android"):
        collect([phone])
    monkeypatch.setattr(cross, "runtime_folder", lambda: None)
    with pytest.raises(TargetUnavailable, match="aarch64"):
        collect([arm])
    with pytest.raises(InputError, match="new folder"):
        write_bundle([artifact], tmp_path)


def test_a_bundle_for_another_processor_has_its_runtime(tmp_path):
    """Libraries for 64-bit Arm, by the machine field of ELF."""
    if cross.runtime_folder() is None:
        pytest.skip("the TVM runtime for aarch64 is not here; `make cross-deps` fetches it")
    tiny = tiny_artifact.make()
    arm = tiny_artifact.with_target(tiny, architecture="aarch64", triple="aarch64-linux-gnu").save(tmp_path / "a.nas")
    native = [data for name, data in collect([arm])["runtime"].items() if name.endswith(".so")]
    assert [data[18:20] for data in native] == [(183).to_bytes(2, "little")] * 2


@pytest.fixture(scope="module")
def run_bundle(tmp_path_factory, artifact) -> Callable[..., subprocess.CompletedProcess]:
    """Write a bundle, and give what runs a program in it where TVM's packages and torch cannot be imported."""
    folder = tmp_path_factory.mktemp("unpacked")
    write_bundle([artifact], folder / "b")
    (folder / "stubs").mkdir()
    for name in ("tvm_ffi", "tvm", "torch", "ray", "networkx", "safetensors", "typer"):
        (folder / "stubs" / f"{name}.py").write_text("raise ImportError('not on a device')\n")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "b" / "lib"), str(folder / "stubs")])}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder / "b", check=False)

    return run


def test_a_bundle_computes_what_the_artifact_computes(tmp_path, artifact, run_bundle):
    """Without TVM's packages: one check, and a run on inputs of one's own."""
    done = run_bundle("run.py", "check")
    assert done.returncode == 0, done.stderr
    assert "runs here" in done.stdout
    rng = np.random.default_rng(3)
    x = rng.standard_normal((tiny_artifact.ROWS, tiny_artifact.INNER)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "out.npz"
    done = run_bundle("run.py", "run", "tiny", "--input", f"x={tmp_path / 'x.npy'}", "--out", str(out))
    assert done.returncode == 0, done.stderr
    model = runtime.load(artifact)
    expected = model(**{**model.example_inputs(), "x": x})
    with np.load(out) as found:
        np.testing.assert_array_equal(found["sum"], expected["sum"])
        np.testing.assert_array_equal(found["positive"], expected["positive"])
    done = run_bundle("run.py", "run", "--input", "x=none.npy")
    assert (done.returncode, "cannot read an input" in done.stderr) == (2, True)


_CALLS = """
import pytest
from codegen import tvm_runtime

ffi = tvm_runtime.load()
assert type(ffi).__module__ == "codegen.tvm_ctypes"
with pytest.raises(RuntimeError, match="cannot open shared object file"):
    ffi.load_module("/nothing/here.so")
with pytest.raises(RuntimeError, match="TypeError"):
    ffi.get_global_func("runtime.config_threadpool")("text")
with pytest.raises(ValueError, match="no function"):
    ffi.get_global_func("no.such.function")
with pytest.raises(TypeError, match="cannot be passed"):
    ffi.get_global_func("ffi.Array")(object())
values = [1, 2.5, True, None, "some text beyond seven characters", "short"]
array = ffi.get_global_func("ffi.Array")(*values)
assert list(array) == values and len(array) == len(values)
"""


def test_the_c_interface_carries_values_and_errors(run_bundle):
    """With the runtime's words; and what it has not got is said."""
    done = run_bundle("-c", _CALLS)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_unpacked_bundle_runs_in_an_environment_with_numpy_alone(tmp_path, artifact):
    """Neither TVM's packages nor torch, and no other module of this project: check, bench, run, and serving."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "numpy>=2.1"], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip("numpy could not be installed into a new environment")
    write_bundle([artifact], tmp_path / "b")
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, str(tmp_path / "b" / "run.py"), *arguments],
            capture_output=True,
            text=True,
            env=variables,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "runs here" in run("check")
    record = json.loads(run("bench", "--threads", "1", "--seconds", "0.5", "--json"))["tiny.nas"]
    assert record["median_ms"] > 0
    assert record["machine"]["versions"]["torch"] is None
    assert "sum: float32[4, 16]" in run("run", "tiny", "--out", str(tmp_path / "out.npz"))

    from codegen.devices.client import Device

    command = [python, str(tmp_path / "b" / "run.py"), "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split(" listens on ")[1].split(" ")[0]
        assert Device.of(address).measure_latency(artifact, threads=1, max_seconds=0.5).median_ms > 0
        server.terminate()
        assert server.wait() == 0
