"""Artifact files: what is written is what is read, and what is damaged is refused."""

import errno
import hashlib
import json
import os
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from codegen import artifact as artifacts
from codegen import container, manifest, runtime, tensors
from codegen.artifact import Artifact
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


def unpack(path: Path) -> dict[str, bytes]:
    """Return the members of a file, in order."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


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
    again = artifacts.read(
        tiny_artifact.with_forward(replace(tiny, weights=weights), weights=tuple(weights)).save(tmp_path / "order.nas")
    )
    assert list(again.forward.weights) == ["z", "a", "m", "b"]
    for name, array in weights.items():
        assert again.weights[name].dtype == array.dtype
        assert again.weights[name].shape == array.shape
        assert np.array_equal(again.weights[name], array)


def test_artifact_stores_equal_parameters_once(tiny: Artifact, saved: Path):
    """A parameter that no kernel wants packed is not stored a second time."""
    with zipfile.ZipFile(saved) as archive:
        stored = tensors.read_tensors(archive.read("parameters.safetensors"))
    assert set(tiny.parameters) - set(stored) == {"w"}


def test_artifact_is_stored_uncompressed(saved: Path):
    """All members are there, stored as they are."""
    with zipfile.ZipFile(saved) as archive:
        assert set(archive.namelist()) == {"manifest.json", *manifest.REQUIRED_MEMBERS}
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


@pytest.mark.parametrize("member", ["manifest.json", *manifest.REQUIRED_MEMBERS])
def test_artifact_with_flipped_byte_in_member_is_refused(saved: Path, member: str):
    """A flipped byte at the start, the middle or the end of any member is found."""
    with zipfile.ZipFile(saved) as archive:
        info = archive.getinfo(member)
    data = saved.read_bytes()
    start = info.header_offset + 30 + sum(struct.unpack_from("<HH", data, info.header_offset + 26))  # name and padding
    assert start % 64 == 0
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


def test_artifact_with_foreign_member_is_refused(tiny: Artifact, saved: Path):
    """A member that is not the one the manifest describes is named, even where the file's own checksum is right."""
    library = hashlib.sha256(tiny.library).hexdigest()
    members = unpack(saved)
    members["manifest.json"] = members["manifest.json"].replace(library.encode(), b"0" * 64)
    artifacts.write_members(saved, members)
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
        tiny_artifact.with_forward(tiny, example_inputs={"x": tiny.example_inputs["x"]})
    with pytest.raises(CompileError, match="element type"):
        replace(tiny, weights={"w": np.zeros(3, np.complex64)})


def test_artifact_manifest_is_plain_json(saved: Path):
    """The manifest says what the file is without this project's code."""
    with zipfile.ZipFile(saved) as archive:
        described = json.loads(archive.read("manifest.json"))
    assert described["format_version"] == 1
    assert described["functions"]["forward"]["weights"] == ["w"]
    assert described["functions"]["forward"]["inputs"][0] == {"name": "x", "shape": [4, 8], "dtype": "float32"}
    assert set(described["members"]) == set(manifest.REQUIRED_MEMBERS)


def test_artifact_arrays_are_aligned_views_of_the_file(saved: Path):
    """Nothing is copied: arrays lie in the mapping, at multiples of 64 bytes, and may be read by vector loads."""
    contents = container.read(saved)
    mapped = np.frombuffer(contents.member("weights.safetensors"), np.uint8)
    for array in (*contents.weights.values(), *contents.expected.values(), *contents.parameters.values()):
        assert array.ctypes.data % 64 == 0
        assert not array.flags.owndata
    assert np.shares_memory(contents.weights["w"], mapped)


def test_artifact_keeps_members_that_it_does_not_know(tiny: Artifact, tmp_path: Path):
    """Further members are read back; names that could lead out of a folder cannot be written."""
    extras = {"kernels/source.cu": b"// nothing", "notes.txt": b""}
    path = replace(tiny, extras=extras).save(tmp_path / "extras.nas")
    assert artifacts.read(path).extras == extras
    for name in ("../x", "/x", "a//b", "", "x" * 300, "manifest.json"):
        with pytest.raises(CompileError, match="cannot be written"):
            replace(tiny, extras={name: b""}).save(tmp_path / "bad.nas")


def test_artifact_that_requires_something_unknown_is_refused(saved: Path):
    """A later writer can say that a reader of today does not understand the file."""
    members = unpack(saved)
    members["manifest.json"] = members["manifest.json"].replace(b'"requires": []', b'"requires": ["wings"]')
    artifacts.write_members(saved, members)
    with pytest.raises(ArtifactError, match="does not know") as caught:
        runtime.load(saved)
    assert caught.value.found == "wings"


def test_artifact_of_two_alike_functions_is_never_made(tiny: Artifact, tmp_path: Path):
    """Functions of one role are told apart by their sizes."""
    twice = replace(tiny, functions={"forward": tiny.forward, "again": tiny.forward})
    with pytest.raises(CompileError, match="in other sizes each"):
        twice.save(tmp_path / "twice.nas")
