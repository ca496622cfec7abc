"""The `.nas` file format: reading it, and checking that every byte is as it was written.

A zip file without compression whose last 64 bytes are the SHA-256, in hex, of all the bytes before them. Standard
library and numpy only, because `codegen.runtime` has no more; `codegen.artifact` writes the format.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ir.errors import ArtifactError

FORMAT_VERSION = 1
DIGEST_CHARACTERS = 64
MEMBERS = (
    "manifest.json",
    "library.so",
    "weights.safetensors",
    "parameters.safetensors",
    "graph.json",
    "expected.safetensors",
)

# safetensors' names of the types that can cross into TVM by DLPack from numpy.
DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a compiled function.

    Attributes:
        name: Argument name.
        shape: Static shape.
        dtype: numpy name of the element type.
        below: Exclusive upper bound of an integer input, e.g. the vocabulary size; values start at 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    below: int | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TensorSpec:
        """Read the form that manifests hold."""
        return cls(fields["name"], tuple(fields["shape"]), fields["dtype"], fields.get("below"))

    def to_dict(self) -> dict[str, Any]:
        """Return the form that manifests hold."""
        fields = asdict(self)
        return fields if self.below is not None else {key: fields[key] for key in ("name", "shape", "dtype")}

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Contents:
    """The checked members of an artifact file."""

    path: Path
    manifest: dict[str, Any]
    library: bytes
    weights: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]
    graph_json: str
    expected: dict[str, np.ndarray]


def read(path: str | Path) -> Contents:
    """Read an artifact file and check its format version and every checksum.

    Raises:
        ArtifactError: The file is missing, damaged or of another format version.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError("cannot read the artifact", where=str(path), found=error.strerror) from error
    _check_digest(path, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            manifest = json.loads(archive.read("manifest.json"))
            _check_version(path, manifest)
            members = {name: _member(path, archive, name, manifest) for name in MEMBERS if name != "manifest.json"}
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise _damaged(path, "the members of an artifact", f"{type(error).__name__}: {error}") from error
    weights = parse_safetensors(members["weights.safetensors"])
    parameters = weights | parse_safetensors(members["parameters.safetensors"])
    return Contents(
        path=path,
        manifest=manifest,
        library=members["library.so"],
        weights=weights,
        parameters={name: parameters[name] for name in manifest["parameters"]},
        graph_json=members["graph.json"].decode(),
        expected=parse_safetensors(members["expected.safetensors"]),
    )


def parse_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Read the safetensors format: a length, a JSON header, then the arrays; the results share the memory of `data`."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = memoryview(data)[8 + length :]
    arrays: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            arrays[name] = np.frombuffer(body[start:end], dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


TOLERANCES: Final[dict[str, float]] = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference between two correct programs, relative to the output's scale, by what products round operands to.

In float32 both round each of some hundred sums; in bfloat16 a last bit tips roundings that are 2^-9 apart.
"""


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference relative to the largest expected magnitude; NaN or infinite if any is."""
    if found.size == 0:
        return 0.0
    wide = expected.astype(np.float64)
    scale = float(np.max(np.abs(wide))) or 1.0
    with np.errstate(invalid="ignore"):  # infinity minus infinity is the NaN that says so
        return float(np.max(np.abs(found.astype(np.float64) - wide))) / scale


def _check_digest(path: Path, data: bytes) -> None:
    if not data.startswith(b"PK"):
        raise _damaged(path, "a .nas file", "a file that starts otherwise" if data else "an empty file")
    body, written = memoryview(data)[:-DIGEST_CHARACTERS], data[-DIGEST_CHARACTERS:]
    if hashlib.sha256(body).hexdigest().encode() != written:
        raise _damaged(path, "the checksum at its end to match its bytes", "another checksum")


def _check_version(path: Path, manifest: Mapping[str, Any]) -> None:
    found = manifest["format_version"]
    if found != FORMAT_VERSION:
        raise ArtifactError(
            "the artifact has another format version",
            where=str(path),
            expected=str(FORMAT_VERSION),
            found=f"{found}, written by version {manifest.get('tool_version')}",
            hint="update this installation" if found > FORMAT_VERSION else "compile it again",
        )


def _member(path: Path, archive: zipfile.ZipFile, name: str, manifest: Mapping[str, Any]) -> bytes:
    data = archive.read(name)
    if hashlib.sha256(data).hexdigest() != manifest["sha256"][name]:
        raise _damaged(path, f"the checksum of {name} to match the manifest", "another checksum")
    return data


def _damaged(path: Path, expected: str, found: str) -> ArtifactError:
    return ArtifactError(
        "the artifact is damaged",
        where=str(path),
        expected=expected,
        found=found,
        hint="copy it again from where it was made, or compile it again",
    )
