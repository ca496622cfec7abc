"""The C++ program that loads an artifact with the headers of tvm_ffi alone."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.codegen.test_museum import FOLDER as MUSEUM
from tests.codegen.test_museum import NAMES, runs_here

SOURCE = Path(__file__).parent / "load_artifact.cc"

pytestmark = [runs_here, pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled."""
    made = tmp_path_factory.mktemp("example") / "load_artifact"
    folders = {}
    for name in ("tvm", "tvm_ffi"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations
        folders[name] = Path(spec.submodule_search_locations[0])
    libraries = [folders["tvm"] / "lib", folders["tvm_ffi"] / "lib"]
    command = ["g++", "-std=c++17", "-O1", f"-I{folders['tvm_ffi']}/include", str(SOURCE), "-o", str(made)]
    command += [f"-L{folder}" for folder in libraries] + [f"-Wl,-rpath,{folder}" for folder in libraries]
    command += ["-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi", "-Wl,--allow-shlib-undefined"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_program_gives_the_expected_outputs(program: Path, name: str):
    """It reads every file of the museum and computes what the file expects."""
    done = subprocess.run([program, MUSEUM / f"{name}.nas"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    differences = [float(line.split()[2]) for line in done.stdout.splitlines() if "differs by" in line]
    # The same code on the same inputs: another processor may round its square roots differently.
    assert differences and max(differences) <= 1e-5


def test_program_refuses_what_is_no_artifact(program: Path, tmp_path: Path):
    """A cut file and a missing one end it with a message."""
    cut = tmp_path / "cut.nas"
    cut.write_bytes((MUSEUM / "v1_plain.nas").read_bytes()[:-100])
    for path in (cut, tmp_path / "absent.nas"):
        done = subprocess.run([program, path], capture_output=True, text=True)
        assert (done.returncode, path.name in done.stderr) == (1, True)
