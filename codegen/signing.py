"""Signatures of artifacts: Ed25519 over the manifest, which holds the checksum of every other member.

A signature is a member `signature.json` of its own; whatever rewrites the file leaves it out. Keys are PEM files as
other programs make them. This module alone imports the library for it, and is imported where a key is given.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from codegen import container
from codegen.archive import MANIFEST, SIGNATURE, Malformed
from codegen.artifact import write_members
from codegen.container import Contents
from codegen.tensors import read_json
from ir.errors import ArtifactError, InputError, StorageError

ALGORITHM: Final = "ed25519"
CONTEXT: Final = b"nas-artifact-v1\n"
"""What the signed message begins with, so that a signature made for something else is none here."""

_FIELDS: Final = {"public_key": re.compile(r"[0-9a-f]{64}"), "signature": re.compile(r"[0-9a-f]{128}")}


def make_keys(private: str | Path, public: str | Path) -> None:
    """Write a new pair of keys: PKCS #8, readable by the owner alone, and SubjectPublicKeyInfo, both PEM.

    Raises:
        InputError: A file is there already.
        StorageError: A file cannot be written.
    """
    for path in (private, public):
        if Path(path).exists():
            raise InputError("a key is not overwritten", where=str(path), expected="a new file", found="one that is")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    shared = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for path, text, mode in ((private, secret, 0o600), (public, shared, 0o644)):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(text)
        except OSError as error:
            raise StorageError("cannot write the key", where=str(path), found=error.strerror) from error


def sign(path: str | Path, key: str | Path) -> str:
    """Sign an artifact in place of an earlier signature, atomically.

    Args:
        path: The `.nas` file.
        key: File with the private key.

    Returns:
        The public key, in hex.

    Raises:
        ArtifactError: The file is damaged.
        InputError: `key` holds no private Ed25519 key.
        StorageError: The file cannot be written.
    """
    secret = _load_key(key, lambda data: serialization.load_pem_private_key(data, None), Ed25519PrivateKey, "private")
    contents = container.read(path)
    public = secret.public_key().public_bytes_raw().hex()
    signature = secret.sign(message(contents)).hex()
    described = {"algorithm": ALGORITHM, "public_key": public, "signature": signature}
    members = {name: contents.member(name) for name in contents.members if name != SIGNATURE}
    write_members(path, members | {SIGNATURE: _encode(described)})
    return public


def check_signature(contents: Contents, key: str | Path) -> None:
    """Check that the owner of a key signed an artifact.

    Args:
        contents: The artifact, checked.
        key: File with the public key.

    Raises:
        ArtifactError: It is not signed, or with another key, or the signature is not that of this content.
        InputError: `key` holds no public Ed25519 key.
    """
    public = _load_key(key, serialization.load_pem_public_key, Ed25519PublicKey, "public")
    where, expected = str(contents.path), f"a signature made with the private key of {key}"
    if contents.signature is None:
        raise ArtifactError("the artifact is not signed", where=where, expected=expected, found="none")
    fields = _fields(contents)
    if fields["public_key"] != public.public_bytes_raw().hex():
        found = f"one made with the key {fields['public_key'][:16]}..."
        raise ArtifactError("the artifact is signed with another key", where=where, expected=expected, found=found)
    try:
        public.verify(bytes.fromhex(fields["signature"]), message(contents))
    except InvalidSignature as error:
        found = "a signature of something else"
        raise ArtifactError("the signature is not that of this artifact", where=where, found=found) from error


def message(contents: Contents) -> bytes:
    """Return what is signed: `CONTEXT`, then the SHA-256 of the manifest in hex."""
    return CONTEXT + hashlib.sha256(contents.member(MANIFEST)).hexdigest().encode()


def _fields(contents: Contents) -> dict[str, str]:
    try:
        fields: Any = read_json(contents.signature or b"")
    except Malformed as error:
        raise container.damaged(contents.path, f"{error.expected} in {SIGNATURE}", error.found) from error
    known = isinstance(fields, dict) and fields.get("algorithm") == ALGORITHM
    if not known or not all(pattern.fullmatch(str(fields.get(name))) for name, pattern in _FIELDS.items()):
        raise container.damaged(contents.path, f"algorithm {ALGORITHM}, public_key and signature", str(fields)[:80])
    if _encode(fields) != contents.signature:
        raise container.damaged(contents.path, f"{SIGNATURE} as it is written", "other bytes")
    return fields


def _encode(fields: dict[str, str]) -> bytes:
    """Return the one way to write a signature, so that not even white space can change in a signed file."""
    return json.dumps({key: fields[key] for key in ("algorithm", *_FIELDS)}, indent=1).encode()


def _load_key(path: str | Path, parse: Any, kind: type, role: str) -> Any:
    try:
        key = parse(Path(path).read_bytes())
    except OSError as error:
        raise InputError("cannot read the key", where=str(path), found=error.strerror) from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, kind):
        raise InputError(
            f"this is no {role} key for signatures",
            where=str(path),
            expected=f"an Ed25519 {role} key in PEM, without a password, such as `nas keygen` writes",
            found="something else",
        )
    return key
