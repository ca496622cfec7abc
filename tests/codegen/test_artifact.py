"""Artifact files: what is written is what is read, and what is damaged is refused."""

import errno
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from codegen import artifact as artifacts
from codegen import container, runtime
from codegen.artifact import Artifact
from codegen.container import MEMBERS
from ir.errors import ArtifactError, CompileError, StorageError
from tests.codegen import tiny_artifact


@pytest.fixture(scope="module")
def tiny() -> Artifact:
    """The small artifact."""
    return tiny_artifact.make()


@pytest.fixture
def saved(tiny: Artifact, tmp_path: Path) -> Path:
    """The small artifact as a file."""
    return tiny.save(tmp_path / "tiny.nas")


def test_artifact_reads_back_as_written(tiny: Artifact, saved: Path):
    """Reading gives every field as it was."""
    again = artifacts.read(saved)
    assert again.library == tiny.library
    assert again.graph_json == tiny.graph_json
    assert list(again.inputs) == list(tiny.inputs)
    assert list(again.outputs) == list(tiny.outputs)
    assert again.target == tiny.target
    assert list(again.kernels) == list(tiny.kernels)
    assert again.verification_error == tiny.verification_error
    arrays = (
        (again.weights, tiny.weights),
        (again.parameters, tiny.parameters),
        (again.example_inputs, tiny.example_inputs),
        (again.expected_outputs, tiny.expected_outputs),
    )
    for mine, theirs in arrays:
        assert list(mine) == list(theirs)
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_artifact_bytes_depend_on_content_alone(saved: Path, tmp_path: Path):
    """Reading and writing again gives the same bytes, whatever the date."""
    again = artifacts.read(saved).save(tmp_path / "again.nas")
    assert again.read_bytes() == saved.read_bytes()


def test_artifact_weights_keep_call_order(tiny: Artifact, tmp_path: Path):
    """The order of the weights is that of the call, not that of the weights file, and shapes such as () survive."""
    weights = {
        "z": np.array([[1, 2]], np.float32),
        "a": np.array([3], np.int8),
        "m": np.array(4.0, np.float16),
        "b": np.array([True, False]),
    }
    again = artifacts.read(replace(tiny, weights=weights).save(tmp_path / "order.nas"))
    assert list(again.weights) == ["z", "a", "m", "b"]
    for name, array in weights.items():
        assert again.weights[name].dtype == array.dtype
        assert again.weights[name].shape == array.shape
        assert np.array_equal(again.weights[name], array)


def test_artifact_stores_equal_parameters_once(tiny: Artifact, saved: Path):
    """A parameter that no kernel wants packed is not stored a second time."""
    with zipfile.ZipFile(saved) as archive:
        stored = container.parse_safetensors(archive.read("parameters.safetensors"))
    assert set(tiny.parameters) - set(stored) == {"w"}


def test_artifact_is_stored_uncompressed(saved: Path):
    """All members are there, stored as they are."""
    with zipfile.ZipFile(saved) as archive:
        assert tuple(archive.namelist()) == MEMBERS
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


@pytest.mark.parametrize("member", MEMBERS)
def test_artifact_with_flipped_byte_in_member_is_refused(saved: Path, member: str):
    """A flipped byte at the start, the middle or the end of any member is found."""
    with zipfile.ZipFile(saved) as archive:
        info = archive.getinfo(member)
    start = info.header_offset + 30 + len(member)  # 30: fixed part of a local file header
    for offset in (start, start + info.file_size // 2, start + info.file_size - 1):
        with pytest.raises(ArtifactError, match="damaged"):
            runtime.load(tiny_artifact.damaged_copy(saved, offset))


def test_artifact_with_flipped_byte_anywhere_is_refused(saved: Path):
    """No byte of the file can change unnoticed: not in the zip's own structures, nor in the checksum at the end."""
    size = saved.stat().st_size
    ends = (*range(64), *range(size - 500, size))
    for offset in {*ends, *map(int, np.random.default_rng(0).integers(0, size, 100))}:
        with pytest.raises(ArtifactError, match="damaged"):
            artifacts.read(tiny_artifact.damaged_copy(saved, offset))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_artifact_cut_short_is_refused(saved: Path, share: float):
    """A file that was not copied to its end is refused."""
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactError, match="damaged"):
        artifacts.read(saved)


def test_artifact_with_foreign_member_is_refused(tiny: Artifact, saved: Path, monkeypatch: pytest.MonkeyPatch):
    """A member that is not the one the manifest describes is named, even where the file's own checksum is right."""
    monkeypatch.setattr(artifacts, "_manifest", lambda *_: {"format_version": 1, "sha256": dict.fromkeys(MEMBERS, "0")})
    tiny.save(saved)
    with pytest.raises(ArtifactError, match=r"library\.so"):
        runtime.load(saved)


def test_artifact_that_is_missing_is_refused(tmp_path: Path):
    """The error names the path."""
    with pytest.raises(ArtifactError, match=r"absent\.nas"):
        artifacts.read(tmp_path / "absent.nas")


@pytest.mark.parametrize(("version", "hint"), [(2, "update this installation"), (0, "compile it again")])
def test_artifact_of_other_format_version_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch, version: int, hint: str
):
    """A file of a later or an earlier format is refused by its version, not by its checksums."""
    monkeypatch.setattr(artifacts, "FORMAT_VERSION", version)
    artifacts.read(saved).save(saved)
    with pytest.raises(ArtifactError, match="format version") as caught:
        runtime.load(saved)
    assert caught.value.hint == hint
    assert caught.value.found is not None
    assert caught.value.found.startswith(str(version))


def test_artifact_latency_can_be_recorded_later(saved: Path):
    """Recording a latency changes the latency and nothing else."""
    before = artifacts.read(saved)
    artifacts.record_latency(saved, {"median_ms": 1.5})
    after = artifacts.read(saved)
    assert before.latency is None
    assert after.latency == {"median_ms": 1.5}
    assert after.library == before.library
    runtime.load(saved)


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EROFS])
def test_artifact_write_failure_leaves_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch, failure: int):
    """With a full disk or a read-only folder the old file stays whole and nothing else is left."""
    before = saved.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=os.strerror(failure)):
        artifacts.record_latency(saved, {"median_ms": 1.0})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_artifact_path_below_a_file_is_a_storage_error(tiny: Artifact, saved: Path):
    """A path that cannot be made says so."""
    with pytest.raises(StorageError, match="cannot write"):
        tiny.save(saved / "below" / "x.nas")


def test_artifact_with_unfit_example_is_refused(tiny: Artifact):
    """An artifact whose self-test does not fit its signature is never made."""
    with pytest.raises(CompileError, match="does not fit"):
        replace(tiny, example_inputs={"x": tiny.example_inputs["x"]})
    with pytest.raises(CompileError, match="element type"):
        replace(tiny, weights={"w": np.zeros(3, np.complex64)})


def test_artifact_manifest_is_plain_json(saved: Path):
    """The manifest says what the file is without this project's code."""
    with zipfile.ZipFile(saved) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    assert manifest["format_version"] == 1
    assert manifest["functions"]["forward"]["weights"] == ["w"]
    assert manifest["functions"]["forward"]["inputs"][0] == {"name": "x", "shape": [4, 8], "dtype": "float32"}
    assert set(manifest["sha256"]) == set(MEMBERS) - {"manifest.json"}
