"""Folders of C: they build without warnings, compute what the graph means, stream, and are whole or not there."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from codegen import targets, toolchain
from codegen.c_export import export as c_folder
from codegen.c_export.example import COMPILE_LINE
from codegen.c_export.export import MANIFEST, CFolder, export
from codegen.container import TOLERANCES, relative_error
from codegen.inputs import sample_inputs
from ir.builder import Builder
from ir.errors import CompileError, InputError, VerificationError
from ir.graph import Graph
from ir.initializers import initialize
from ir.interpret import evaluate
from ir.types import Axis
from tests.codegen.small_models import STREAMING, TOKENS, WHOLE, language_model, of

TARGET = targets.get("cpu", threads=1)
TOLERANCE = TOLERANCES["float32"]  # sums of some hundred products, in another order than the interpreter's
GOAL_BYTES = 100_000
STRICT = "-Wall -Wextra -Wno-unused-parameter -Werror"

pytestmark = pytest.mark.skipif(isinstance(toolchain.find(TARGET), str), reason=f"{toolchain.find(TARGET)}")


def write(graphs: Mapping[str, Graph], folder: Path, target: targets.Target = TARGET, seed: int = 0) -> CFolder:
    """Export graphs with fresh weights."""
    return export(graphs, initialize(next(iter(graphs.values())), seed), target, folder)


def build(folder: Path, compiler: str = "cc") -> None:
    """Compile the example as the README says, without a warning."""
    subprocess.run([*compiler.split(), *STRICT.split(), *COMPILE_LINE.split()], cwd=folder, check=True)


def call(folder: Path, function: str, inputs: list[np.ndarray], outputs: int = 1) -> list[np.ndarray]:
    """Run the example program on arrays; results are float32, flat."""
    names: list[str] = []
    for number, array in enumerate(inputs):
        (folder / f"in{number}").write_bytes(np.ascontiguousarray(array).tobytes())
        names.append(f"in{number}")
    made = [f"out{number}" for number in range(outputs)]
    subprocess.run(["./example", function, *names, *made], cwd=folder, check=True, capture_output=True)
    return [np.fromfile(folder / name, np.float32) for name in made]


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Graph, dict[str, np.ndarray]]:
    """A decoder with a cache of 19 tokens: folder, graph, parameters."""
    model = STREAMING["attention"]
    graph, folder = model(), tmp_path_factory.mktemp("c") / "decoder"
    params = initialize(graph, 0)
    export({"forward": graph, "step": model(step=True)}, params, TARGET, folder, metadata={"trial": 3})
    build(folder)
    return folder, graph, params


def test_folder_computes_what_the_graph_means(streaming: tuple[Path, Graph, dict[str, np.ndarray]]) -> None:
    """On inputs that are not those of its example."""
    folder, graph, params = streaming
    for seed in (5, 6):
        tokens = sample_inputs(graph, seed)["tokens"]
        expected = evaluate(graph, {"tokens": tokens}, params)["logits"]
        [logits] = call(folder, "forward", [tokens])
        assert relative_error(logits.reshape(expected.shape), expected) <= TOLERANCE


def test_step_continues_a_stream(streaming: tuple[Path, Graph, dict[str, np.ndarray]]) -> None:
    """Token by token it gives what the whole sequence gives; one token more than it was made for is refused."""
    folder, graph, _ = streaming
    tokens = sample_inputs(graph, 7)["tokens"]
    [whole], [steps] = call(folder, "forward", [tokens]), call(folder, "step", [tokens])
    assert relative_error(steps, whole) <= TOLERANCE
    with pytest.raises(subprocess.CalledProcessError) as refused:
        call(folder, "step", [np.concatenate([tokens, tokens[:, :1]], axis=1)])
    assert b"the state is full" in refused.value.stderr


FORK = """
#include <stdio.h>
#include "model.h"
static decoder_state one, other;
static float logits[4096];
static void show(decoder_state *state, int32_t token) {
    decoder_step(state, &token, logits);
    printf("%.9g %.9g ", logits[0], logits[1]);
}
int main(void) {
    decoder_start(&one);
    show(&one, 3), show(&one, 1);
    other = one; /* a fork */
    show(&one, 4), show(&other, 2), show(&one, 1), show(&other, 1);
    return 0;
}
"""


def test_caches_are_in_the_state_once_and_copies_of_it_are_forks(
    streaming: tuple[Path, Graph, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """A step writes its rows into the caches; the tokens of one fork change nothing in the other."""
    folder, graph, params = streaming
    manifest = json.loads((folder / MANIFEST).read_text())
    caches = manifest["functions"]["step"]["state_bytes"]
    assert f"int64_t kept[{caches // 8}];" in (folder / "model.h").read_text()
    (tmp_path / "fork.c").write_text(FORK)
    sources = [f"{folder}/{name}" for name in ("model.c", "kernels.o", "weights.S")]
    compiler = ["cc", *STRICT.split(), f"-I{folder}", f"-Wa,-I{folder}"]
    subprocess.run([*compiler, "fork.c", *sources, "-lm", "-o", "fork"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "fork"], capture_output=True, text=True, check=True).stdout
    found = np.array(printed.split(), np.float64).reshape(-1, 2)
    for rows, stream in ((found[[0, 1, 2, 4]], (3, 1, 4, 1)), (found[[0, 1, 3, 5]], (3, 1, 2, 1))):
        tokens = np.zeros((1, TOKENS.seq_len), np.int32)
        tokens[0, : len(stream)] = stream
        expected = evaluate(graph, {"tokens": tokens}, params)["logits"][0, : len(stream), :2]
        assert relative_error(rows, expected) <= TOLERANCE


def test_index_out_of_range_is_refused(streaming: tuple[Path, Graph, dict[str, np.ndarray]]) -> None:
    """A token beyond the vocabulary reads no memory that is not the table's."""
    folder, graph, _ = streaming
    for bad in (-1, TOKENS.vocab_size):
        tokens = sample_inputs(graph, 7)["tokens"]
        tokens[0, 3] = bad
        with pytest.raises(subprocess.CalledProcessError) as refused:
            call(folder, "forward", [tokens])
        assert b"out of range" in refused.value.stderr


def test_example_checks_itself(streaming: tuple[Path, Graph, dict[str, np.ndarray]], tmp_path: Path) -> None:
    """`check` passes on the folder's examples and fails on an output that is not the model's."""
    folder, _, _ = streaming
    examples = Path(shutil.copytree(folder / "data", tmp_path / "data"))
    assert subprocess.run([folder / "example", "check", examples], check=False).returncode == 0
    expected = examples / "step.out.logits.bin"
    changed = np.fromfile(expected, np.float32)
    changed[-1] += 0.01 * np.abs(changed).max()
    changed.tofile(expected)
    assert subprocess.run([folder / "example", "check", examples], check=False).returncode == 1


def test_manifest_describes_the_folder(streaming: tuple[Path, Graph, dict[str, np.ndarray]]) -> None:
    """Checksums of the files, the signature with bounds, the state, the verification and the metadata."""
    folder, _, _ = streaming
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert manifest["functions"]["forward"]["inputs"] == [
        {"name": "tokens", "shape": [1, 19], "dtype": "int32", "below": TOKENS.vocab_size}
    ]
    assert manifest["functions"]["step"]["most_steps"] == TOKENS.seq_len
    assert manifest["verification"]["error"] <= TOLERANCE
    assert (manifest["threads"], manifest["metadata"]) == (1, {"trial": 3})


def test_kernels_need_the_c_library_only(streaming: tuple[Path, Graph, dict[str, np.ndarray]]) -> None:
    """Nothing of a runtime is left undefined in the object file."""
    folder, _, _ = streaming
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listed = subprocess.run(["nm", "-u", folder / "kernels.o"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in listed.splitlines()} <= {"memset", "memcpy", "memmove", "sincosf"}


def test_names_that_c_has_taken_are_arguments_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input named as a keyword, one as a thing inside model.c, one as an output, and one that is an output."""
    monkeypatch.chdir(tmp_path)
    b = Builder()
    x, w, y = b.input("double", (2, 3)), b.input("weights", (2, 3)), b.input("y.0", (3,))
    scale = b.parameter("scale", ((Axis("d", 3),),), "normal(1)")
    graph = b.build(y_0=x * w + scale, same=y, again=x * w + scale)
    params = initialize(graph, 0)
    export({"forward": graph}, params, TARGET, "1 model")
    build(tmp_path / "1 model")
    inputs = sample_inputs(graph, 3)
    expected = evaluate(graph, inputs, params)
    found = call(tmp_path / "1 model", "forward", list(inputs.values()), outputs=3)
    for array, value in zip(found, expected.values(), strict=True):
        assert relative_error(array.reshape(value.shape), value) <= TOLERANCE


def test_folder_is_replaced_whole_or_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of something else is refused, a failed export leaves the old one, a good one replaces it."""
    graph = small()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="left alone"):
        write({"forward": graph}, other)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    first = write({"forward": graph}, tmp_path / "m")
    before = {path: path.read_bytes() for path in first.files}
    with monkeypatch.context() as patch:
        patch.setenv("CC", "false")
        with pytest.raises(CompileError, match="the C compiler refuses"):
            write({"forward": graph}, tmp_path / "m", seed=1)
    assert {path: path.read_bytes() for path in first.files} == before
    second = write({"forward": graph}, tmp_path / "m", seed=1)
    assert (second.path / "weights.bin").read_bytes() != before[second.path / "weights.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "other"]


def test_wrong_result_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What disagrees with torch is not written."""
    true = c_folder.torch_outputs
    monkeypatch.setattr(c_folder, "torch_outputs", lambda *of: {name: a + 0.01 for name, a in true(*of).items()})
    with pytest.raises(VerificationError, match="disagrees with torch"):
        write({"forward": small()}, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def small() -> Graph:
    """The smallest model with a weight."""
    b = Builder()
    return b.build(y=b.exp(b.linear(b.input("x", (3, 8)), "w", (Axis("hidden", 4),))))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STREAMING, *WHOLE])
def test_every_kind_of_model_compiles(name: str, tmp_path: Path) -> None:
    """All of the dozen agree with torch, streams included, on the instruction set that all processors have."""
    graphs = {"forward": {**STREAMING, **WHOLE}[name]()}
    if name in STREAMING:
        graphs["step"] = STREAMING[name](step=True)
    for target in (TARGET, targets.get("cpu:sse", threads=1)):
        made = write(graphs, tmp_path / "m", target)
        assert made.verification_error is not None
        assert made.verification_error <= TOLERANCE
    build(tmp_path / "m")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_folder_builds_by_hand_and_by_cmake(compiler: str, tmp_path: Path) -> None:
    """With either compiler, without warnings; the header is C++ too."""
    if shutil.which(compiler) is None or shutil.which("cmake") is None:
        pytest.skip(f"{compiler} or cmake is not installed")
    model = STREAMING["gla"]
    folder = write({"forward": model(), "step": model(step=True)}, tmp_path / "m").path
    build(folder, compiler)
    commands = (
        f"cmake -S {folder} -B {tmp_path / 'b'} -DCMAKE_C_COMPILER={compiler}",
        f"cmake --build {tmp_path / 'b'}",
        f"ctest --test-dir {tmp_path / 'b'}",
    )
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True)
    if shutil.which("g++"):
        subprocess.run(["g++", "-Wall", "-Werror", "-fsyntax-only", "-x", "c++", folder / "model.h"], check=True)


@pytest.mark.slow
def test_language_model_of_four_layers_is_small(tmp_path: Path) -> None:
    """Gated linear attention: less than 100 KB of code as `size` counts, and most weights once for both functions."""
    layer = of("gated_linear_attention", num_heads=4), of("glu", expansion=2.667)
    graphs = {
        "forward": language_model(*layer, width=128, depth=4),
        "step": language_model(*layer, width=128, depth=4, step=True),
    }
    manifest = write(graphs, tmp_path / "m").manifest
    alone = write({"forward": graphs["forward"]}, tmp_path / "m").manifest
    assert manifest["weight_bytes"] < 1.4 * alone["weight_bytes"]
    if manifest["code_bytes"] is None:
        pytest.skip("size is not installed")
    assert manifest["code_bytes"] < GOAL_BYTES
