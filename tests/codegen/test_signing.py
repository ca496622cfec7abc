"""Signatures: who signed a file, and that nothing in it changed since."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from codegen import artifact as artifacts
from codegen import container, runtime, signing
from codegen.archive import MANIFEST, SIGNATURE
from ir.errors import ArtifactError, InputError
from tests.codegen.artifact_mutations import pack, unpack
from tests.codegen.test_museum import FOLDER


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A new pair of keys: private, public."""
    signing.make_keys(tmp_path / "a.key", tmp_path / "a.pub")
    return tmp_path / "a.key", tmp_path / "a.pub"


@pytest.fixture
def signed(keys: tuple[Path, Path], tmp_path: Path) -> Path:
    """A signed copy of a file of the museum."""
    path = tmp_path / "x.nas"
    shutil.copy(FOLDER / "v1_plain.nas", path)
    signing.sign(path, keys[0])
    return path


def check(path: Path, key: Path) -> None:
    """Check the signature of a file."""
    signing.check_signature(container.read(path), key)


def test_signature_holds_and_is_replaced(signed: Path, keys: tuple[Path, Path], tmp_path: Path):
    """It holds for its key; another key's signature takes its place."""
    check(signed, keys[1])
    signing.make_keys(tmp_path / "b.key", tmp_path / "b.pub")
    signing.sign(signed, tmp_path / "b.key")
    check(signed, tmp_path / "b.pub")
    with pytest.raises(ArtifactError, match="another key"):
        check(signed, keys[1])


def test_signature_leaves_the_content_alone(signed: Path, tmp_path: Path):
    """Without it the file is as it was; whatever writes the file again leaves it out."""
    assert unpack(signed.read_bytes())[:-1] == unpack((FOLDER / "v1_plain.nas").read_bytes())
    artifacts.record_latency(signed, {"median_ms": 1.0})
    assert container.read(signed).signature is None


def test_changed_manifest_under_a_good_digest_is_refused(signed: Path, keys: tuple[Path, Path]):
    """The digest at the end tells damage; the signature tells changes that somebody made."""
    members = dict(unpack(signed.read_bytes()))
    manifest = json.loads(members[MANIFEST])
    manifest["metadata"]["trained_by"] = "somebody else"
    members[MANIFEST] = json.dumps(manifest).encode()
    signed.write_bytes(pack(list(members.items())))
    container.read(signed)
    with pytest.raises(ArtifactError, match="not that of this artifact"):
        check(signed, keys[1])


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"algorithm": "none", "public_key": "", "signature": ""}'])
def test_signature_that_is_none_is_damage(signed: Path, keys: tuple[Path, Path], text: bytes):
    """Whatever stands in its place."""
    members = dict(unpack(signed.read_bytes())) | {SIGNATURE: text}
    signed.write_bytes(pack(list(members.items())))
    with pytest.raises(ArtifactError, match="damaged"):
        check(signed, keys[1])


def test_keys_that_are_none_are_bad_input(signed: Path, keys: tuple[Path, Path], tmp_path: Path):
    """The other half of the pair, noise, and a file that is not there; a key is never overwritten."""
    (tmp_path / "noise").write_bytes(b"noise")
    for key in (keys[0], tmp_path / "noise", tmp_path / "absent"):
        with pytest.raises(InputError):
            check(signed, key)
    for key in (keys[1], tmp_path / "noise", tmp_path / "absent"):
        with pytest.raises(InputError):
            signing.sign(signed, key)
    with pytest.raises(InputError, match="overwritten"):
        signing.make_keys(*keys)


def test_private_key_is_for_the_owner_alone(keys: tuple[Path, Path]):
    """Nobody else may read it."""
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_agrees(signed: Path, keys: tuple[Path, Path], tmp_path: Path):
    """The message and the keys are what the specification says, for another program too."""
    contents = container.read(signed)
    fields = json.loads(contents.signature or b"{}")
    (tmp_path / "message").write_bytes(signing.message(contents))
    (tmp_path / "signature").write_bytes(bytes.fromhex(fields["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(keys[1]), "-rawin"]
    command += ["-in", str(tmp_path / "message"), "-sigfile", str(tmp_path / "signature")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_the_library_a_key_is_refused(signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    """Loading needs it only where a key is given, and then says so."""
    monkeypatch.setitem(sys.modules, "codegen.signing", None)
    with pytest.raises(InputError, match="cannot be checked"):
        runtime.load(signed, key=keys[1])
