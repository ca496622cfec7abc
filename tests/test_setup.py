"""Set-up: the lock is exact and complete, and the Makefile says clearly what a machine lacks."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tomli
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-bench.lock", "requirements-gpu.lock")


def read_lock(name: str) -> list[Requirement]:
    """Give the requirements of a lock file, comments dropped."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned_versions(*names: str) -> dict[str, str]:
    """Give name -> version of what the lock files pin for the running interpreter."""
    pins = [pin for name in names for pin in read_lock(name) if pin.marker is None or pin.marker.evaluate()]
    return {pin.name: next(iter(pin.specifier)).version for pin in pins}


def declared(extra: str | None) -> list[Requirement]:
    """Give the requirements that pyproject.toml declares, those of an extra or the tool's own."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]


@pytest.mark.parametrize("name", LOCKS)
def test_lock_pins_every_package_exactly(name: str) -> None:
    """A range in a lock would install something else tomorrow."""
    for pin in read_lock(name):
        assert [part.operator for part in pin.specifier] == ["=="], str(pin)


@pytest.mark.parametrize("name", LOCKS)
def test_lock_names_no_cuda_package(name: str) -> None:
    """Gigabytes of CUDA have no place in a set-up that takes a minute."""
    assert [pin.name for pin in read_lock(name) if pin.name.startswith(("nvidia", "cuda", "triton"))] == []


def test_lock_pins_torch_and_tvm_as_tested() -> None:
    """These three are known to work together; tvm needs its own ffi, and torch no local version suffix."""
    pins = pinned_versions("requirements.lock")
    assert pins["torch"] == "2.13.0"
    assert pins["apache-tvm"] == "0.27.0.post1"
    assert pins["apache-tvm-ffi"] == "0.1.14.post1"


@pytest.mark.parametrize("extra", [None, "dev", "bench"])
def test_lock_satisfies_pyproject(extra: str | None) -> None:
    """What pyproject.toml declares is pinned, to a version that it allows."""
    pins = pinned_versions(*LOCKS)
    for requirement in declared(extra):
        assert requirement.name in pins, f"{requirement} is not locked"
        assert requirement.specifier.contains(pins[requirement.name]), f"{requirement}, locked {pins[requirement.name]}"


@pytest.fixture
def fresh_machine(tmp_path: Path) -> Path:
    """Give a folder with the Makefile and a `bin` that holds only the basic tools: no Python, no compiler."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "sh", "cat", "flock", "grep", "head", "rm", "touch"):
        found = shutil.which(name)
        assert found is not None, name
        (tools / name).symlink_to(found)
    return tmp_path


def add_tool(folder: Path, name: str, script: str = "exit 0") -> None:
    """Put an executable shell script on the fresh machine's path."""
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in `folder` with its `bin` as the whole path."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    environment["PATH"] = str(folder / "bin")
    command = [str(folder / "bin" / "make"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_setup_without_compiler_names_gcc(fresh_machine: Path) -> None:
    """Without gcc, set-up stops before installing anything and says what to install."""
    process = make(fresh_machine, "setup")
    assert process.returncode != 0
    assert "apt install gcc" in process.stderr
    assert not (fresh_machine / ".venv").exists()


def test_setup_without_python_names_what_was_looked_for(fresh_machine: Path) -> None:
    """Without any Python, the error lists the names that were tried."""
    add_tool(fresh_machine, "gcc")
    process = make(fresh_machine, "setup")
    assert process.returncode != 0
    assert "no Python >= 3.10 among: python3.11" in process.stderr


def test_setup_with_old_python_refuses_it(fresh_machine: Path) -> None:
    """A Python whose version check fails counts as none."""
    add_tool(fresh_machine, "gcc")
    add_tool(fresh_machine, "python3", "exit 1")
    process = make(fresh_machine, "setup")
    assert process.returncode != 0
    assert "no Python >= 3.10" in process.stderr


def test_setup_without_venv_module_names_its_package(fresh_machine: Path) -> None:
    """Debian ships Python without ensurepip; the error names the package that has it."""
    add_tool(fresh_machine, "gcc")
    add_tool(fresh_machine, "python3", 'case "$2" in *ensurepip*) exit 1;; esac')
    process = make(fresh_machine, "setup")
    assert process.returncode != 0
    assert "apt install python3-venv" in process.stderr


def test_setup_is_not_repeated_when_nothing_changed(fresh_machine: Path) -> None:
    """A stamp that is newer than the lock and names this folder means nothing to do, even with no Python around."""
    (fresh_machine / ".venv").mkdir()
    (fresh_machine / ".venv" / ".installed").write_text(f"{fresh_machine.resolve()}\n", encoding="utf-8")
    process = make(fresh_machine, "--question", "setup")
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.parametrize("stamp", [None, "/another/folder\n"])
def test_setup_is_repeated_when_interrupted_or_moved(fresh_machine: Path, stamp: str | None) -> None:
    """Without a stamp, or with one written for another folder, the installation cannot be trusted."""
    (fresh_machine / ".venv").mkdir()
    if stamp is not None:
        (fresh_machine / ".venv" / ".installed").write_text(stamp, encoding="utf-8")
    assert make(fresh_machine, "--question", "setup").returncode == 1
