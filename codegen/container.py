"""The `.nas` file format: reading it, and checking that every byte is as it was written.

The file is mapped, not read: arrays are views of the mapping, and every byte is hashed once. Standard library and numpy
only, because `codegen.runtime` has no more. `codegen.archive` knows the zip, `codegen.manifest` the manifest,
`codegen.tensors` the arrays; `codegen.artifact` writes the format. `docs/artifact-format.md` is the specification.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from codegen import archive
from codegen.archive import MANIFEST, SIGNATURE, Entry, Malformed
from codegen.manifest import (
    EXPECTED,
    FORMAT_VERSION,
    FORWARD,
    KNOWN_REQUIREMENTS,
    LIBRARY,
    PARAMETERS,
    REQUIRED_MEMBERS,
    WEIGHTS,
    check_manifest,
)
from codegen.tensors import read_json, read_tensors
from ir.errors import ArtifactError

_VERSION_AT: Final = slice(64, 128)  # the manifest comes first, and the version first in it
_VERSION: Final = re.compile(rb'\{\s*"format_version":\s*(\d{1,9})\D')
_PIECE_BYTES: Final = 16 * 2**20
_COPY_AGAIN: Final = "copy it again from where it was made, or compile it again"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a compiled function.

    Attributes:
        name: Argument name.
        shape: Static shape.
        dtype: numpy name of the element type.
        below: Exclusive upper bound of an integer input, e.g. the vocabulary size; values start at 0.
        axes: For each axis `batch`, `seq_len` or None: how it grows from one function of a role to the next; None
            where a role has one function.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    below: int | None = None
    axes: tuple[str | None, ...] | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TensorSpec:
        """Read the form that manifests hold."""
        axes = fields.get("axes")
        shape, below = tuple(fields["shape"]), fields.get("below")
        return cls(fields["name"], shape, fields["dtype"], below, None if axes is None else tuple(axes))

    def to_dict(self) -> dict[str, Any]:
        """Return the form that manifests hold."""
        fields = asdict(self)
        return {key: value for key, value in fields.items() if value is not None}

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


class Contents:
    """An artifact file that is open: its manifest, and its members as views of the mapped file.

    A member is checked when it is asked for first; `check` checks all. The mapping lives as long as any view of it.
    The file must not be written into meanwhile; replacing it, as this tool does, is harmless.

    Attributes:
        path: The file.
        manifest: What the artifact says about itself; checked.
        members: Place of each member.
    """

    def __init__(self, path: Path, data: memoryview, members: Mapping[str, Entry], manifest: dict[str, Any]) -> None:
        self.path, self.manifest, self.members = path, manifest, members
        self._data = data
        self._checked: set[str] = {MANIFEST, SIGNATURE}

    def member(self, name: str) -> memoryview:
        """Return the bytes of a member, as they were written.

        Raises:
            ArtifactError: There is none, or its checksum is another one.
        """
        entry = self.members.get(name)
        if entry is None:
            raise damaged(self.path, f"a member {name}", "none")
        view = self._data[entry.start : entry.end]
        if name not in self._checked:
            if self._sha256(entry) != self.manifest["members"][name]["sha256"]:
                raise damaged(self.path, f"the checksum of {name} to match the manifest", "another checksum")
            self._checked.add(name)
        return view

    def check(self) -> None:
        """Check every member.

        Raises:
            ArtifactError: A checksum is another one.
        """
        for name in self.members:
            self.member(name)

    def check_function(self, name: str) -> None:
        """Check that a function's weights are there, and the arrays of its self-test as its signature has them.

        Raises:
            ArtifactError: They are not.
        """
        function = self.manifest["functions"][name]
        missing = [weight for weight in function["weights"] if weight not in self.weights]
        if missing:
            raise damaged(self.path, f"weight {missing[0]} of function {name}", "none")
        for role, specs in (("input", function["inputs"]), ("output", function["outputs"])):
            for spec in specs:
                array = self.expected.get(f"{name}.{role}.{spec['name']}")
                if array is None or array.shape != tuple(spec["shape"]) or array.dtype != spec["dtype"]:
                    found = "none" if array is None else f"{array.dtype}{list(array.shape)}"
                    raise damaged(self.path, f"{role} {spec['name']} of the self-test of {name}", found)

    @property
    def library(self) -> bytes:
        """A copy of the shared library: what is checked is what is loaded, whatever happens to the file."""
        return bytes(self.member(LIBRARY))

    @functools.cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Arrays in the layouts that kernels read."""
        return self._tensors(WEIGHTS)

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """Inputs and outputs of the self-tests: `FUNCTION.input.NAME` and `FUNCTION.output.NAME`."""
        return self._tensors(EXPECTED)

    @functools.cached_property
    def parameters(self) -> dict[str, np.ndarray]:
        """The graph's own parameters, some of which are weights as they are."""
        own, found = self._tensors(PARAMETERS), dict[str, np.ndarray]()
        for name, weight in self.manifest["parameters"].items():
            place, key = (own, name) if weight is None else (self.weights, weight)
            if key not in place:
                raise damaged(self.path, f"parameter {name}", "none")
            found[name] = place[key]
        return found

    @property
    def graph_json(self) -> str:
        """The graph of `forward`."""
        return self.graph(FORWARD)

    def graph(self, function: str) -> str:
        """Return the graph of a function as JSON."""
        return str(self.member(self.manifest["functions"][function]["graph"]), "utf-8")

    @property
    def extras(self) -> dict[str, bytes]:
        """Members besides those that this version needs."""
        graphs = {function["graph"] for function in self.manifest["functions"].values()}
        own = {MANIFEST, SIGNATURE, *REQUIRED_MEMBERS, *graphs}
        return {name: bytes(self.member(name)) for name in self.members if name not in own}

    @property
    def signature(self) -> bytes | None:
        """The signature's member, unchecked; None where the file is not signed."""
        return bytes(self.member(SIGNATURE)) if SIGNATURE in self.members else None

    def _sha256(self, entry: Entry) -> str:
        """Hash a member piece by piece, and let go of each, so that what is not used later takes no memory."""
        digest = hashlib.sha256()
        for start in range(entry.start, entry.end, _PIECE_BYTES):
            end = min(start + _PIECE_BYTES, entry.end)
            digest.update(self._data[start:end])
            if isinstance(self._data.obj, mmap.mmap):
                page = start - start % mmap.PAGESIZE
                self._data.obj.madvise(mmap.MADV_DONTNEED, page, end - page)
        return digest.hexdigest()

    def _tensors(self, name: str) -> dict[str, np.ndarray]:
        try:
            return read_tensors(self.member(name))
        except Malformed as error:
            raise damaged(self.path, f"{error.expected} in {name}", error.found) from error


def open_file(path: str | Path) -> Contents:
    """Map an artifact file, check its structure and its manifest, and leave the other members unread.

    Raises:
        ArtifactError: The file is missing, damaged or of another format version.
    """
    path = Path(path)
    data = _map(path)
    try:
        members = archive.parse(data)
        archive.check_digest(data, members)
        entry = members[MANIFEST]
        manifest = read_json(data[entry.start : entry.end])
        _check_version(path, manifest)
        check_manifest(manifest)
        _check_members(data, members, manifest["members"])
    except Malformed as error:
        version = _VERSION.match(data[_VERSION_AT])
        if version is not None and int(version[1]) != FORMAT_VERSION:
            raise _other_version(path, int(version[1]), "another version") from error
        raise damaged(path, error.expected, error.found) from error
    _check_requirements(path, manifest)
    return Contents(path, data, members, manifest)


def read(path: str | Path) -> Contents:
    """Map an artifact file and check its format version and every checksum.

    Raises:
        ArtifactError: The file is missing, damaged or of another format version.
    """
    contents = open_file(path)
    contents.check()
    return contents


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


def damaged(path: Path, expected: str, found: str) -> ArtifactError:
    """Return the error for a file that is not as it was written."""
    return ArtifactError("the artifact is damaged", where=str(path), expected=expected, found=found, hint=_COPY_AGAIN)


def _map(path: Path) -> memoryview:
    """Map a file privately: never written back, but arrays on it can be handed to code that wants them writable."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise damaged(path, "a .nas file", "an empty file")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise ArtifactError("cannot read the artifact", where=str(path), found=found) from error


def _check_version(path: Path, manifest: Any) -> None:
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(found, int) or isinstance(found, bool):
        raise Malformed("a format version in the manifest", str(found)[:80])
    if found != FORMAT_VERSION:
        raise _other_version(path, found, f"version {manifest.get('tool_version')}")


def _other_version(path: Path, found: int, writer: str) -> ArtifactError:
    return ArtifactError(
        "the artifact has another format version",
        where=str(path),
        expected=str(FORMAT_VERSION),
        found=f"{found}, written by {writer}",
        hint="update this installation" if found > FORMAT_VERSION else "compile it again",
    )


def _check_requirements(path: Path, manifest: Mapping[str, Any]) -> None:
    unknown = sorted(set(manifest["requires"]) - KNOWN_REQUIREMENTS)
    if unknown:
        raise ArtifactError(
            "the artifact needs what this version does not know",
            where=str(path),
            expected=", ".join(sorted(KNOWN_REQUIREMENTS)) or "nothing",
            found=", ".join(unknown)[:200],
            hint="update this installation",
        )


def _check_members(data: memoryview, members: Mapping[str, Entry], listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the members are those that the manifest lists, in its order, the signature last."""
    found = [(name, entry.size, entry.crc32) for name, entry in members.items()]
    expected = [(name, fields["bytes"], fields["crc32"]) for name, fields in listed.items()]
    for name, place in ((MANIFEST, 0), (SIGNATURE, len(expected) + 1)):
        if name in members:
            entry = members[name]
            expected.insert(place, (name, entry.size, zlib.crc32(data[entry.start : entry.end])))
    if found != expected:
        differing = sorted({name for name, *_ in set(found) ^ set(expected)}) or ["their order"]
        raise Malformed("the members that the manifest lists", f"a difference in {', '.join(differing)[:200]}")
