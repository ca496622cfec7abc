"""Compiled models as objects and as `.nas` files.

A `.nas` file is a zip without compression that holds

- `manifest.json`: format version, target, functions with their signatures, versions, checksums, measured latency
- `library.so`: the Relax virtual machine's executable with all kernels; each function takes its inputs, then its
  weights, in the manifest's order, and returns a tensor, or a tuple where there are several outputs
- `weights.safetensors`: the weights in the layouts that the kernels read, each once whichever functions read it
- `graph.json`, `graph.NAME.json`: the graphs that were compiled, to compile them again for another target
- `parameters.safetensors`: the graphs' parameters as they declare them, less those that are weights as they are
- `expected.safetensors`: inputs and outputs of the self-tests

and whatever else a target needs. `docs/artifact-format.md` is the specification, `codegen.container` reads it. The same
content gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from codegen import archive, container, machine, manifest
from codegen.archive import Buffer, Malformed
from codegen.container import Contents, TensorSpec
from codegen.manifest import FORMAT_VERSION, FORWARD, ROLES
from codegen.targets.base import Target
from codegen.tensors import DTYPES, read_json, write_tensors
from ir.errors import CompileError, StorageError
from ir.files import replace_file

# The expected outputs come from the same library, so this only allows for another processor of the same kind.
SELF_TEST_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Function:
    """One function of a compiled model; its key in the artifact is its name in the library.

    Attributes:
        inputs: Arguments.
        outputs: Results.
        weights: Names of the arrays that it takes after its inputs, in order.
        graph_json: The compiled graph.
        graph_hash: Its canonical hash.
        example_inputs: Inputs of the self-test, by name.
        expected_outputs: What the library returned for them, by name.
        role: `forward`, `prefill` or `step`; several functions of one role are for different shapes.
        carried: Inputs that are outputs too: what a stream hands from one call to the next.
        position: Input that is the number of tokens before these; None where there is none.
        padded: Axes, of `batch` and `seq_len`, along which a smaller input may be padded without changing its results.
        verification_error: Largest difference from the reference, relative to the output's scale; None where the code
            was not run. Then the expected outputs are the reference's.
        kernels: For each node, the kernel that serves it.
        memory: Bytes of weights and of what lives between kernels, see `MemoryPlan.describe`.
    """

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    weights: Sequence[str]
    graph_json: str
    graph_hash: str
    example_inputs: Mapping[str, np.ndarray]
    expected_outputs: Mapping[str, np.ndarray]
    role: str = FORWARD
    carried: Sequence[str] = ()
    position: str | None = None
    padded: Sequence[str] = ()
    verification_error: float | None = None
    kernels: Sequence[Mapping[str, Any]] = ()
    memory: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise CompileError("no such role of a function", expected=", ".join(ROLES), found=self.role)
        _check_arrays("input", self.inputs, self.example_inputs)
        _check_arrays("output", self.outputs, self.expected_outputs)

    @property
    def examples(self) -> dict[str, np.ndarray]:
        """Inputs and outputs of the self-test as the file names them, less the function."""
        given = {f"input.{spec.name}": self.example_inputs[spec.name] for spec in self.inputs}
        return given | {f"output.{spec.name}": self.expected_outputs[spec.name] for spec in self.outputs}


@dataclass(frozen=True)
class Artifact:
    """A compiled model with all that is needed to run, check, describe and recompile it.

    What is said of one function, such as `inputs`, is said of `forward`, at its smallest shape.

    Attributes:
        library: Bytes of the shared library.
        functions: Its functions by name; `forward` is one of them.
        weights: Arrays by name, in the layouts that kernels read.
        parameters: The graphs' own parameters by name, before packing.
        target: Fields of the target, see `describe_target`.
        threads: Threads it was compiled for.
        unverified: Why the code was not run, empty where it was.
        latency: Record of a measurement, None before one.
        tuning_records: Identities of the records that knobs were taken from, see `TuningDatabase.identity`.
        metadata: Anything else that is JSON.
        versions: Software that compiled it.
        extras: Further members by name, such as sources of kernels.
    """

    library: bytes
    functions: Mapping[str, Function]
    weights: Mapping[str, np.ndarray]
    parameters: Mapping[str, np.ndarray]
    target: Mapping[str, Any]
    threads: int
    unverified: str = ""
    latency: Mapping[str, Any] | None = None
    tuning_records: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=machine.versions)
    extras: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in (*self.weights.items(), *self.parameters.items()):
            _check_dtype(f"weight '{name}'", array.dtype.name)

    @property
    def forward(self) -> Function:
        """The function `forward`."""
        return self.functions[FORWARD]

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """Arguments of `forward`."""
        return self.forward.inputs

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """Results of `forward`."""
        return self.forward.outputs

    @property
    def graph_json(self) -> str:
        """Graph of `forward`."""
        return self.forward.graph_json

    @property
    def graph_hash(self) -> str:
        """Canonical hash of the graph of `forward`."""
        return self.forward.graph_hash

    @property
    def example_inputs(self) -> Mapping[str, np.ndarray]:
        """Inputs of the self-test of `forward`."""
        return self.forward.example_inputs

    @property
    def expected_outputs(self) -> Mapping[str, np.ndarray]:
        """Outputs of the self-test of `forward`."""
        return self.forward.expected_outputs

    @property
    def kernels(self) -> Sequence[Mapping[str, Any]]:
        """Kernels of `forward`."""
        return self.forward.kernels

    @property
    def memory(self) -> Mapping[str, int]:
        """Memory of `forward`."""
        return self.forward.memory

    @property
    def verification_error(self) -> float | None:
        """Largest difference of any function from the reference; None where the code was not run."""
        errors = [function.verification_error for function in self.functions.values()]
        return max((error for error in errors if error is not None), default=None)

    def save(self, path: str | Path) -> Path:
        """Write the artifact to a `.nas` file; see `write`."""
        return write(path, self)


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
        **({"gpu": {"kind": target.gpu.kind, "model": target.gpu.model}} if target.gpu else {}),
    }


def write(path: str | Path, artifact: Artifact) -> Path:
    """Write an artifact so that the file is either whole or not there. It is not signed, see `codegen.signing`.

    Raises:
        StorageError: The disk is full, the folder is read-only, or the like; nothing is left behind.
        CompileError: The format cannot hold it.
    """
    held = _held(artifact)
    members: dict[str, Buffer] = {
        manifest.LIBRARY: artifact.library,
        manifest.WEIGHTS: write_tensors(artifact.weights),
        manifest.PARAMETERS: write_tensors(
            {name: artifact.parameters[name] for name, weight in held.items() if weight is None}
        ),
        **{_graph_member(name): function.graph_json.encode() for name, function in artifact.functions.items()},
        manifest.EXPECTED: write_tensors(
            {
                f"{name}.{key}": array
                for name, function in artifact.functions.items()
                for key, array in function.examples.items()
            }
        ),
        **artifact.extras,
    }
    described = _manifest(artifact, held)
    described["members"] = {
        name: {"bytes": len(data), "crc32": zlib.crc32(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in members.items()
    }
    try:
        encoded = json.dumps(described, indent=1, allow_nan=False).encode()
        manifest.check_manifest(read_json(encoded))
        return write_members(path, {archive.MANIFEST: encoded} | members)
    except Malformed as error:
        raise CompileError("the artifact cannot be written", expected=error.expected, found=error.found) from error


def write_members(path: str | Path, members: Mapping[str, Buffer]) -> Path:
    """Write the members of an artifact, in order.

    Raises:
        Malformed: The format cannot hold them.
        StorageError: The file cannot be written; nothing is left behind.
    """
    path, pieces = Path(path), tuple(archive.pack(members))
    try:
        replace_file(path, *pieces)
    except OSError as error:
        raise StorageError(
            "cannot write the artifact",
            where=str(path),
            found=error.strerror,
            hint="free some space, or choose a folder that can be written with -o",
        ) from error
    return path


def read(path: str | Path) -> Artifact:
    """Read a `.nas` file whole, for any machine.

    Raises:
        ArtifactError: The file is missing, damaged or of another format version.
    """
    contents = container.read(path)
    described = contents.manifest
    return Artifact(
        library=contents.library,
        functions={name: _function(contents, name) for name in described["functions"]},
        weights=contents.weights,
        parameters=contents.parameters,
        target=described["target"],
        threads=described["threads"],
        unverified=described["self_test"].get("unverified", ""),
        latency=described["latency"],
        tuning_records=described["tuning_records"],
        metadata=described["metadata"],
        versions=described["versions"],
        extras=contents.extras,
    )


def record_latency(path: str | Path, latency: Mapping[str, Any]) -> Artifact:
    """Write a measured latency into an existing file, atomically; a signature is gone with that.

    Returns:
        The artifact as it is now.
    """
    artifact = replace(read(path), latency=dict(latency))
    write(path, artifact)
    return artifact


def _function(contents: Contents, name: str) -> Function:
    fields, expected = contents.manifest["functions"][name], contents.expected
    inputs = tuple(TensorSpec.from_dict(item) for item in fields["inputs"])
    outputs = tuple(TensorSpec.from_dict(item) for item in fields["outputs"])
    contents.check_function(name)
    return Function(
        inputs=inputs,
        outputs=outputs,
        weights=tuple(fields["weights"]),
        graph_json=contents.graph(name),
        graph_hash=fields["graph_hash"],
        example_inputs={spec.name: expected[f"{name}.input.{spec.name}"] for spec in inputs},
        expected_outputs={spec.name: expected[f"{name}.output.{spec.name}"] for spec in outputs},
        role=fields["role"],
        carried=tuple(fields["carried"]),
        position=fields["position"],
        padded=tuple(axis for axis, exact in fields["padding"].items() if exact),
        verification_error=fields["verification_error"],
        kernels=fields["kernels"],
        memory=fields["memory"],
    )


def _manifest(artifact: Artifact, held: Mapping[str, str | None]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "requires": [manifest.GPU] if "gpu" in artifact.target else [],
        "tool_version": artifact.versions.get("nas"),
        "target": dict(artifact.target),
        "threads": artifact.threads,
        "functions": {name: _describe(name, function) for name, function in artifact.functions.items()},
        "parameters": dict(held),
        "versions": dict(artifact.versions),
        "self_test": _self_test(artifact),
        "latency": artifact.latency,
        "tuning_records": list(artifact.tuning_records),
        "metadata": dict(artifact.metadata),
    }


def _describe(name: str, function: Function) -> dict[str, Any]:
    return {
        "role": function.role,
        "inputs": [spec.to_dict() for spec in function.inputs],
        "outputs": [spec.to_dict() for spec in function.outputs],
        "weights": list(function.weights),
        "carried": list(function.carried),
        "position": function.position,
        "padding": {axis: axis in function.padded for axis in manifest.AXES},
        "graph": _graph_member(name),
        "graph_hash": function.graph_hash,
        "verification_error": function.verification_error,
        "kernels": [dict(kernel) for kernel in function.kernels],
        "memory": dict(function.memory),
    }


def _graph_member(function: str) -> str:
    return manifest.GRAPH if function == FORWARD else f"graph.{function}.json"


def _self_test(artifact: Artifact) -> dict[str, Any]:
    if not artifact.unverified:
        return {"tolerance": SELF_TEST_TOLERANCE}
    rounds = any('"bfloat16"' in function.graph_json for function in artifact.functions.values())
    tolerance = container.TOLERANCES["bfloat16" if rounds else "float32"]
    return {"tolerance": tolerance, "unverified": artifact.unverified}


def _held(artifact: Artifact) -> dict[str, str | None]:
    """Name for each parameter the weight that is the same array; None where no kernel reads it as it is."""
    weights = {_identity(array): name for name, array in artifact.weights.items()}
    return {name: weights.get(_identity(array)) for name, array in artifact.parameters.items()}


def _identity(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    digest = hashlib.sha256(np.asarray(array, order="C").reshape(-1).view(np.uint8).data).digest()
    return array.dtype.name, array.shape, digest


def _check_arrays(role: str, specs: Sequence[TensorSpec], arrays: Mapping[str, np.ndarray]) -> None:
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


def _check_dtype(where: str, dtype: str) -> None:
    if dtype not in DTYPES.values():
        raise CompileError(
            "an artifact cannot hold this element type",
            where=where,
            expected=f"one of {', '.join(sorted(DTYPES.values()))}",
            found=dtype,
        )
