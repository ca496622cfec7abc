"""Loading and running artifacts, and refusing those that cannot run here."""

import os
import subprocess
import sys
import threading
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from codegen import artifact as artifacts
from codegen import machine, runtime
from codegen.artifact import Artifact
from ir.errors import ArtifactError, InputError
from tests.codegen import tiny_artifact

REPOSITORY = Path(__file__).parents[2]

# What `load` may look for beside the standard library. typing_extensions and ml_dtypes come with apache-tvm; of tvm it
# wants to know the folder, and may not import it.
ALLOWED = ("numpy", "tvm", "tvm_ffi", "typing_extensions", "ml_dtypes", "codegen", "ir")

RUN_TINY = """
import sys
import numpy as np
from codegen import runtime
model = runtime.load(sys.argv[1])
out = model(np.zeros((4, 8), np.float32), np.ones((4, 1), np.int32))
assert (out["sum"] == 1).all(), out
print(",".join(sorted({name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))))
"""

BLOCK_OTHERS = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {ALLOWED!r} and name.split(".")[0] not in sys.stdlib_module_names:
            raise ImportError(f"blocked: {{name}}")
sys.meta_path.insert(0, Block())
"""


@pytest.fixture(scope="module")
def tiny() -> Artifact:
    """The small artifact."""
    return tiny_artifact.make()


@pytest.fixture
def saved(tiny: Artifact, tmp_path: Path) -> Path:
    """The small artifact as a file."""
    return tiny.save(tmp_path / "tiny.nas")


def run_tiny(python: Path | str, script: str, path: Path) -> str:
    """Run a script on an artifact in another process and return what it prints."""
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]}
    command = [str(python), "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_runtime_model_computes_by_position_and_by_name(saved: Path):
    """Both ways of calling give what numpy gives."""
    model = runtime.load(saved)
    rng = np.random.default_rng(1)
    x, ids = rng.standard_normal((4, 8), np.float32), rng.integers(0, 100, (4, 1), np.int32)
    expected = x @ artifacts.read(saved).weights["w"] + ids
    for result in (model(x, ids), model(ids=ids, x=x), model(x, ids=ids)):
        assert isinstance(result, dict)
        assert list(result) == ["sum", "positive"]
        # Values reach 100 and a dot product has 8 terms: a few units in the last place of float32.
        np.testing.assert_allclose(result["sum"], expected, rtol=1e-6, atol=2e-5)
        np.testing.assert_array_equal(result["positive"], np.maximum(result["sum"], 0))


def test_runtime_single_output_is_an_array(tmp_path: Path):
    """One output comes as it is, without a dictionary."""
    model = runtime.load(tiny_artifact.make(outputs=1).save(tmp_path / "one.nas"))
    result = model(**model.example_inputs())
    assert isinstance(result, np.ndarray)
    assert result.shape == (4, 16)


def test_runtime_results_outlive_calls_and_model(saved: Path):
    """A result is the caller's: later calls do not change it, nor does the end of the model."""
    model = runtime.load(saved)
    first = model(np.ones((4, 8), np.float32), np.zeros((4, 1), np.int32))
    assert isinstance(first, dict)
    kept = {name: array.copy() for name, array in first.items()}
    for _ in range(3):
        model(np.full((4, 8), 7, np.float32), np.zeros((4, 1), np.int32))
    del model
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])


def test_runtime_takes_any_layout_and_exact_conversions(saved: Path):
    """Strided, unaligned, Fortran-ordered arrays and plain integers are taken as they come."""
    model = runtime.load(saved)
    x = np.random.default_rng(0).standard_normal((8, 4)).T
    odd = np.zeros(4 * 8 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(4, 8)
    odd[:] = x
    plain = model(np.ascontiguousarray(x, np.float32), np.array([[1], [2], [3], [4]], np.int32))
    assert isinstance(plain, dict)
    for variant in (model(x, [[1], [2], [3], [4]]), model(odd, np.arange(1, 5)[:, None])):
        assert isinstance(variant, dict)
        np.testing.assert_array_equal(variant["sum"], plain["sum"])


X, IDS = np.zeros((4, 8), np.float32), np.zeros((4, 1), np.int32)


@pytest.mark.parametrize(
    ("arrays", "named", "message"),
    [
        ((X,), {}, "ids: an input is missing"),
        ((X, IDS, X), {}, "too many inputs"),
        ((X,), {"idx": IDS}, "did you mean 'ids'"),
        ((X, IDS), {"x": X}, "given twice"),
        ((X.T, IDS), {}, r"x: an input has the wrong shape\n  expected: \[4, 8\]\n  found: \[8, 4\]"),
        ((X, IDS.astype(np.float32)), {}, "ids: an input has the wrong element type"),
        ((X, IDS + 100), {}, "ids: an input has values out of range\n  expected: 0 to 99\n  found: 100 to 100"),
        ((X, IDS - 1), {}, "out of range"),
        ((X, IDS.astype(np.int64) + 2**32), {}, "out of range"),
    ],
)
def test_runtime_unfit_input_is_refused(saved: Path, arrays: tuple, named: dict, message: str):
    """What does not fit the signature is refused before it reaches compiled code."""
    model = runtime.load(saved)
    with pytest.raises(InputError, match=message):
        model(*arrays, **named)


def test_runtime_serves_threads_and_thread_counts(saved: Path):
    """Calls from other threads, and models of other thread counts, give the same results in one process."""
    available = len(os.sched_getaffinity(0))
    models = [runtime.load(saved, threads=count) for count in (1, available, 1)]
    x = np.random.default_rng(0).standard_normal((4, 8), np.float32)
    results: list[np.ndarray] = []

    def call(model: runtime.LoadedModel) -> None:
        outcome = model(x, IDS)
        assert isinstance(outcome, dict)
        results.append(outcome["sum"])

    workers = [threading.Thread(target=call, args=(model,)) for model in models * 2]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 6
    assert all(np.array_equal(result, results[0]) for result in results)


def test_runtime_leaves_affinity_alone(saved: Path):
    """Loading does not pin the caller to a core, which would slow down everything else in the process."""
    before = os.sched_getaffinity(0)
    runtime.load(saved, threads=1)
    assert os.sched_getaffinity(0) == before


def test_runtime_too_many_threads_is_refused(saved: Path):
    """More threads than CPUs are bad input."""
    with pytest.raises(InputError, match="threads"):
        runtime.load(saved, threads=10_000)


def test_runtime_wrong_instruction_set_is_refused(tiny: Artifact, tmp_path: Path):
    """An artifact that needs instructions this processor lacks is refused before any of its code is mapped."""
    features = [*tiny.target["features"], "avx1024_quantum"]
    path = tiny_artifact.with_target(tiny, features=features, mcpu="later").save(tmp_path / "x.nas")
    with pytest.raises(ArtifactError, match="lacks instructions") as caught:
        runtime.load(path)
    assert caught.value.expected == "a processor like later, with avx1024_quantum"
    assert caught.value.exit_code == 2


def test_runtime_wrong_architecture_is_refused(tiny: Artifact, tmp_path: Path):
    """An artifact for another kind of processor is refused by its name."""
    path = tiny_artifact.with_target(tiny, architecture="riscv64").save(tmp_path / "x.nas")
    with pytest.raises(ArtifactError, match="riscv64"):
        runtime.load(path)


def test_runtime_other_tvm_is_refused(tiny: Artifact, tmp_path: Path):
    """An artifact of another TVM release is refused, with the versions to install; patch releases are fine."""
    other = replace(tiny, versions={**tiny.versions, "tvm": "0.19.0"}).save(tmp_path / "other.nas")
    with pytest.raises(ArtifactError, match=r"apache-tvm==0\.19\.0"):
        runtime.load(other)
    release = ".".join((machine.versions()["tvm"] or "").split(".")[:2])
    runtime.load(replace(tiny, versions={**tiny.versions, "tvm": f"{release}.99"}).save(tmp_path / "patch.nas"))


def test_runtime_self_test_refuses_other_results(tiny: Artifact, tmp_path: Path):
    """A model that does not give what it gave when it was made is refused, unless the self-test is off."""
    expected = {name: array + np.float32(0.01) for name, array in tiny.expected_outputs.items()}
    path = tiny_artifact.with_forward(tiny, expected_outputs=expected).save(tmp_path / "x.nas")
    with pytest.raises(ArtifactError, match="self-test fails: output 'sum'"):
        runtime.load(path)
    runtime.load(path, self_test=False)


def test_runtime_library_that_is_none_is_refused(tiny: Artifact, tmp_path: Path):
    """Bytes that are no shared library give an artifact error, whatever the checksums say."""
    path = replace(tiny, library=b"not a library").save(tmp_path / "x.nas")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        runtime.load(path)


def test_runtime_leaves_no_temporary_files(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The unpacked library is gone once it is mapped."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    model = runtime.load(saved)
    assert not list(folder.iterdir())
    model(X, IDS)


def test_verify_reports_what_was_checked(saved: Path):
    """The report names the checks and the error; a damaged file raises."""
    report = runtime.verify(saved)
    # The expected outputs are numpy's: another order of the 8 additions differs in the last bits.
    assert report.max_error <= 1e-6
    assert len(report.checks) == 6
    assert report.manifest["functions"]["forward"]["graph_hash"] == "0" * 64
    with pytest.raises(ArtifactError):
        runtime.verify(tiny_artifact.damaged_copy(saved, 1000))


def test_runtime_needs_numpy_and_tvm_runtime_only(saved: Path):
    """With every other library blocked, an artifact loads and runs."""
    loaded = run_tiny(sys.executable, BLOCK_OTHERS + RUN_TINY, saved).split(",")
    assert "tvm_ffi" in loaded
    assert not {"tvm", "torch", "safetensors", "networkx"} & set(loaded)


def test_runtime_and_compiler_share_a_process(saved: Path):
    """The whole of TVM can be imported after an artifact was loaded by the runtime alone, and compiles."""
    script = RUN_TINY + (
        "from codegen import _tvm\n"
        "from tests.codegen import tiny_artifact\n"
        "tiny_artifact.make().save(sys.argv[1])\n"
        "assert (runtime.load(sys.argv[1])(np.zeros((4, 8)), np.ones((4, 1), np.int32))['sum'] == 1).all()\n"
    )
    run_tiny(sys.executable, script, saved)


@pytest.mark.slow
def test_runtime_works_in_fresh_environment(saved: Path, tmp_path: Path):
    """In a new virtual environment with numpy and apache-tvm alone, an artifact loads and runs."""
    here = machine.versions()
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    needs = [f"numpy=={here['numpy']}", f"apache-tvm=={here['tvm']}", f"apache-tvm-ffi=={here['tvm_ffi']}"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *needs], check=True)
    loaded = run_tiny(python, RUN_TINY, saved).split(",")
    assert not {"torch", "safetensors", "networkx"} & set(loaded)
