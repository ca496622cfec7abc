"""Compiled models as objects and as `.nas` files.

A `.nas` file is a zip without compression that holds

- `manifest.json`: format version, target, signature, versions, checksums, verification error, measured latency
- `library.so`: the Relax virtual machine's executable with all kernels; its function `forward` takes the inputs, then
  the weights, in the manifest's order, and returns a tensor, or a tuple where there are several outputs
- `weights.safetensors`: the weights in the layouts that the kernels read
- `graph.json`: the graph that was compiled, to compile it again for another target
- `parameters.safetensors`: the graph's parameters as it declares them, less those that are weights as they are
- `expected.safetensors`: inputs and outputs of the self-test

and ends in the SHA-256 of everything before (`codegen.container` reads it). The same content gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_safetensors

from codegen import container, machine
from codegen.container import DIGEST_CHARACTERS, DTYPES, FORMAT_VERSION, TensorSpec
from codegen.targets.base import Target
from ir.errors import CompileError, StorageError
from ir.files import replace_file

# The expected outputs come from the same library, so this only allows for another processor of the same kind.
SELF_TEST_TOLERANCE = 1e-5

_FIRST_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Artifact:
    """A compiled model with all that is needed to run, check, describe and recompile it.

    Attributes:
        library: Bytes of the shared library.
        weights: Arrays by name, in the order in which `forward` takes them after its inputs.
        parameters: The graph's own parameters by name, before packing.
        graph_json: The compiled graph.
        graph_hash: Its canonical hash.
        inputs: Arguments of `forward`.
        outputs: Results of `forward`.
        example_inputs: Inputs of the self-test, by name.
        expected_outputs: What the library returned for them, by name.
        target: Fields of the target, see `describe_target`.
        threads: Threads it was compiled for.
        verification_error: Largest difference from the reference, relative to the output's scale; None where the code
            was not run. Then the expected outputs are the reference's.
        unverified: Why the code was not run, empty where it was.
        kernels: For each node, the kernel that serves it.
        memory: Bytes of weights and of what lives between kernels, see `MemoryPlan.describe`.
        latency: Record of a measurement, None before one.
        metadata: Anything else that is JSON.
        versions: Software that compiled it.
    """

    library: bytes
    weights: Mapping[str, np.ndarray]
    parameters: Mapping[str, np.ndarray]
    graph_json: str
    graph_hash: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    example_inputs: Mapping[str, np.ndarray]
    expected_outputs: Mapping[str, np.ndarray]
    target: Mapping[str, Any]
    threads: int
    verification_error: float | None = None
    unverified: str = ""
    kernels: Sequence[Mapping[str, Any]] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    latency: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=machine.versions)

    def __post_init__(self) -> None:
        self._check("input", self.inputs, self.example_inputs)
        self._check("output", self.outputs, self.expected_outputs)
        for name, array in (*self.weights.items(), *self.parameters.items()):
            _check_dtype(f"weight '{name}'", array.dtype.name)

    def save(self, path: str | Path) -> Path:
        """Write the artifact to a `.nas` file; see `write`."""
        return write(path, self)

    def _check(self, role: str, specs: Sequence[TensorSpec], arrays: Mapping[str, np.ndarray]) -> None:
        for spec in specs:
            _check_dtype(f"{role} '{spec.name}'", spec.dtype)
            array = arrays.get(spec.name)
            if array is None or array.shape != spec.shape or array.dtype.name != spec.dtype:
                raise CompileError(
                    f"the self-test's {role} does not fit the signature",
                    where=spec.name,
                    expected=str(spec),
                    found="nothing" if array is None else f"{array.dtype}{list(array.shape)}",
                )


def describe_target(target: Target) -> dict[str, Any]:
    """Return what an artifact records of its target."""
    return {
        "name": target.name,
        "fingerprint": target.fingerprint,
        "architecture": target.architecture,
        "mcpu": target.mcpu,
        "isa": target.isa.name,
        "features": list(target.features),
        **({"triple": target.triple} if target.triple else {}),
    }


def write(path: str | Path, artifact: Artifact) -> Path:
    """Write an artifact so that the file is either whole or not there.

    Raises:
        StorageError: The disk is full, the folder is read-only, or the like; nothing is left behind.
    """
    packed = {name: array for name, array in artifact.parameters.items() if not _holds(artifact.weights, name, array)}
    members = {
        "library.so": artifact.library,
        "weights.safetensors": _safetensors(artifact.weights),
        "parameters.safetensors": _safetensors(packed),
        "graph.json": artifact.graph_json.encode(),
        "expected.safetensors": _safetensors(
            {f"input.{name}": array for name, array in artifact.example_inputs.items()}
            | {f"output.{name}": array for name, array in artifact.expected_outputs.items()}
        ),
    }
    manifest = _manifest(artifact, {name: hashlib.sha256(data).hexdigest() for name, data in members.items()})
    encoded = json.dumps(manifest, indent=1, allow_nan=False).encode()
    return _replace_file(Path(path), _zip({"manifest.json": encoded} | members))


def read(path: str | Path) -> Artifact:
    """Read a `.nas` file whole, for any machine.

    Raises:
        ArtifactError: The file is missing, damaged or of another format version.
    """
    contents = container.read(path)
    manifest = contents.manifest
    function = manifest["functions"]["forward"]
    expected = contents.expected
    inputs = tuple(TensorSpec.from_dict(item) for item in function["inputs"])
    outputs = tuple(TensorSpec.from_dict(item) for item in function["outputs"])
    return Artifact(
        library=contents.library,
        weights={name: contents.weights[name] for name in function["weights"]},
        parameters=contents.parameters,
        graph_json=contents.graph_json,
        graph_hash=manifest["graph_hash"],
        inputs=inputs,
        outputs=outputs,
        example_inputs={spec.name: expected[f"input.{spec.name}"] for spec in inputs},
        expected_outputs={spec.name: expected[f"output.{spec.name}"] for spec in outputs},
        target=manifest["target"],
        threads=manifest["threads"],
        verification_error=manifest["verification_error"],
        unverified=manifest["self_test"].get("unverified", ""),
        kernels=manifest["kernels"],
        memory=manifest.get("memory", {}),
        latency=manifest["latency"],
        metadata=manifest["metadata"],
        versions=manifest["versions"],
    )


def record_latency(path: str | Path, latency: Mapping[str, Any]) -> Artifact:
    """Write a measured latency into an existing file, atomically.

    Returns:
        The artifact as it is now.
    """
    artifact = replace(read(path), latency=dict(latency))
    write(path, artifact)
    return artifact


def _manifest(artifact: Artifact, digests: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "tool_version": artifact.versions.get("nas"),
        "target": dict(artifact.target),
        "threads": artifact.threads,
        "functions": {
            "forward": {
                "inputs": [spec.to_dict() for spec in artifact.inputs],
                "outputs": [spec.to_dict() for spec in artifact.outputs],
                "weights": list(artifact.weights),
            }
        },
        "parameters": list(artifact.parameters),
        "graph_hash": artifact.graph_hash,
        "versions": dict(artifact.versions),
        "verification_error": artifact.verification_error,
        "self_test": _self_test(artifact),
        "latency": artifact.latency,
        "kernels": [dict(kernel) for kernel in artifact.kernels],
        "memory": dict(artifact.memory),
        "metadata": dict(artifact.metadata),
        "sha256": dict(digests),
    }


def _self_test(artifact: Artifact) -> dict[str, Any]:
    if not artifact.unverified:
        return {"tolerance": SELF_TEST_TOLERANCE}
    return {"tolerance": container.TOLERANCES["float32"], "unverified": artifact.unverified}


def _check_dtype(where: str, dtype: str) -> None:
    if dtype not in DTYPES.values():
        raise CompileError(
            "an artifact cannot hold this element type",
            where=where,
            expected=f"one of {', '.join(sorted(DTYPES.values()))}",
            found=dtype,
        )


def _holds(arrays: Mapping[str, np.ndarray], name: str, array: np.ndarray) -> bool:
    held = arrays.get(name)
    return (
        held is not None
        and held.dtype == array.dtype
        and held.shape == array.shape
        and held.tobytes() == array.tobytes()
    )


def _safetensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    return save_safetensors({name: np.asarray(array, order="C") for name, array in arrays.items()})


def _zip(members: Mapping[str, bytes]) -> bytes:
    """Pack without compression or dates, and end in the digest of all that precedes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = b"0" * DIGEST_CHARACTERS
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, _FIRST_ZIP_DATE), data)
    packed = buffer.getbuffer()
    packed[-DIGEST_CHARACTERS:] = hashlib.sha256(packed[:-DIGEST_CHARACTERS]).hexdigest().encode()
    return bytes(packed)


def _replace_file(path: Path, data: bytes) -> Path:
    try:
        replace_file(path, data)
    except OSError as error:
        raise StorageError(
            "cannot write the artifact",
            where=str(path),
            found=error.strerror,
            hint="free some space, or choose a folder that can be written with -o",
        ) from error
    return path
