"""Files that version 1 of the artifact format wrote are read, and give what they always gave."""

import platform
from pathlib import Path

import numpy as np
import pytest

from codegen import artifact as artifacts
from codegen import container, machine, runtime
from ir.errors import ArtifactError, InputError
from tests.codegen.make_museum import reference

FOLDER = Path(__file__).parents[1] / "golden" / "artifacts"
NAMES = ("v1_plain", "v1_step", "v1_signed")
TOLERANCE = 1e-5  # float32 against float64 over nine steps of sums of eight

runs_here = pytest.mark.skipif(
    platform.machine() != "x86_64"
    or not {"sse4_2", "ssse3"} <= machine.cpu_features()
    or not (machine.versions()["tvm"] or "").startswith("0.27."),
    reason="the files are for x86-64 with SSE4.2 and the runtime of TVM 0.27",
)


def load(name: str) -> runtime.LoadedModel:
    """Load a file of the museum."""
    return runtime.load(FOLDER / f"{name}.nas", key=FOLDER / "v1.pub" if name == "v1_signed" else None)


@pytest.mark.parametrize("name", NAMES)
def test_museum_file_is_small_and_whole(name: str):
    """Every member is under its checksum; the files stay small enough to be committed."""
    path = FOLDER / f"{name}.nas"
    contents = container.read(path)
    assert contents.manifest["format_version"] == 1
    assert path.stat().st_size < 60_000


@pytest.mark.parametrize("name", ["v1_plain", "v1_step"])
def test_museum_file_is_written_again_as_it_was(name: str, tmp_path: Path):
    """Today's writer gives the same bytes for the same content, so the format has not moved."""
    path = FOLDER / f"{name}.nas"
    assert artifacts.read(path).save(tmp_path / "again.nas").read_bytes() == path.read_bytes()


@runs_here
def test_museum_plain_file_computes():
    """Two outputs of one product."""
    model = load("v1_plain")
    w = container.read(FOLDER / "v1_plain.nas").parameters["w"].astype(np.float64)
    x = np.random.default_rng(3).standard_normal((2, 8)).astype(np.float32)
    outputs = model(x)
    assert isinstance(outputs, dict)
    np.testing.assert_allclose(outputs["sum"], x @ w, atol=TOLERANCE)
    np.testing.assert_allclose(outputs["positive"], np.maximum(x @ w, 0), atol=TOLERANCE)


@runs_here
def test_museum_streaming_file_computes_at_once_and_token_by_token():
    """`forward` and `step` give the same, which is the recurrence's."""
    model = load("v1_step")
    tokens = np.random.default_rng(4).integers(0, 11, (1, 8), np.int32)
    expected = reference(container.read(FOLDER / "v1_step.nas").parameters, tokens)
    np.testing.assert_allclose(np.asarray(model(tokens)), expected, atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(model.stream().feed(tokens)), expected, atol=TOLERANCE)


@runs_here
@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_museum_signed_file_pads(count: int):
    """The shortest function that fits serves, and what stands for padding is gone."""
    model = load("v1_signed")
    tokens = np.random.default_rng(count).integers(0, 11, (1, count), np.int32)
    found = np.asarray(model(tokens))
    expected = reference(container.read(FOLDER / "v1_signed.nas").parameters, tokens)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    with pytest.raises(InputError, match="sizes"):
        model(np.zeros((1, 10), np.int32))


@runs_here
def test_museum_signature_is_demanded_where_a_key_is_given():
    """A file without a signature does not pass for one with it; unknown members are kept."""
    assert container.read(FOLDER / "v1_signed.nas").extras == {"notes/for-people.txt": b"Nothing reads this.\n"}
    with pytest.raises(ArtifactError, match="not signed"):
        runtime.load(FOLDER / "v1_plain.nas", key=FOLDER / "v1.pub")
