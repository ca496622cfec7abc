"""Export: generate the code in a worker process, write the folder, compile it, run it, hold it against torch."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from codegen import artifact, machine, toolchain
from codegen.c_export import example, sources
from codegen.c_export.program import Program, make_program
from codegen.c_export.signature import POSITION, STEP, Signature, identifier, signature_of
from codegen.code_workers import worker_for
from codegen.compile import TIMEOUT_S, require_expanded
from codegen.container import TOLERANCES, relative_error
from codegen.inputs import sample_inputs
from codegen.kernels.base import Array
from codegen.reference import torch_outputs
from codegen.targets.base import Target
from codegen.toolchain import Toolchain
from codegen.tuning import TuningDatabase
from codegen.workers import RemoteError
from ir.errors import CompileError, InputError, StorageError, VerificationError
from ir.graph import Graph
from ir.hashing import canonical_hash
from ir.passes.lower_precision import precision_of

FORMAT: Final = "nas-c"
MANIFEST: Final = "model.json"
STEPS: Final = 4
"""Steps of the example of a recurrent model."""

_FUNCTIONS: Final = ("forward", STEP)
_NEW: Final = "new"


@dataclass(frozen=True)
class CFolder:
    """An exported folder.

    Attributes:
        path: The folder.
        verification_error: Largest difference from torch, relative to the output's scale; None where it was not run.
        unverified: Why it was not run, empty where it was.
        manifest: What `model.json` holds.
    """

    path: Path
    verification_error: float | None
    unverified: str
    manifest: Mapping[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the folder."""
        return tuple(sorted(path for path in self.path.rglob("*") if path.is_file()))


@dataclass(frozen=True)
class _Example:
    """Inputs of some calls of a function in a row, and what torch gives for them."""

    inputs: Mapping[str, Array]
    expected: Mapping[str, Array]


def export(
    graphs: Mapping[str, Graph],
    params: Mapping[str, Array],
    target: Target,
    folder: str | Path,
    *,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    tuning_root: str | Path | None = None,
) -> CFolder:
    """Write a model as a folder of C, verified where this machine can run it.

    Args:
        graphs: `forward`, `step` or both, without component nodes; they share parameters by name.
        params: A float32 array for each parameter.
        target: What to compile for; the code runs on one thread and without Strassen's algorithm.
        folder: What to write; a folder that an earlier export wrote is replaced.
        name: First word of every symbol; the folder's name where None.
        metadata: Anything to keep in `model.json`.
        tuning_root: Folder of the tuning databases.

    Raises:
        InputError: The folder is something else, or there is no such function.
        CompileError: A node has no kernel, or a compiler refuses.
        VerificationError: The outputs differ from torch by more than `TOLERANCES` allow.
        KernelCrash: The generated code ended its process.
        StorageError: The folder cannot be written.
    """
    folder = Path(folder)
    _check(graphs, target, folder)
    target = target.single_threaded().without_strassen()
    prefix = identifier(name or folder.absolute().name)
    for function, graph in graphs.items():
        signature_of(function, graph)  # refused before the work
    program = _generate(graphs, params, target, tuning_root, prefix)
    model = _Model(
        prefix=prefix,
        target=target,
        graphs=graphs,
        signatures=[signature_of(made.name, graphs[made.name], made.kept) for made in program.functions],
        program=program,
        tolerance=max(TOLERANCES[precision_of(graph)] for graph in graphs.values()),
    )
    examples = {signature.name: _example(signature, graphs[signature.name], params) for signature in model.signatures}
    try:
        beside = folder.absolute().parent
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=beside) as scratch:
            manifest = _build(model, examples, Path(scratch), metadata)
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            (Path(scratch) / _NEW).rename(folder)
    except OSError as error:
        raise StorageError("cannot write the folder", where=str(folder), found=error.strerror) from error
    return CFolder(folder, manifest["verification"]["error"], manifest["verification"]["unverified"], manifest)


@dataclass(frozen=True)
class _Model:
    """What is exported.

    Attributes:
        prefix: First word of every symbol.
        target: What the code is for.
        graphs: Graph of each function.
        signatures: The functions.
        program: Their machine code and weights.
        tolerance: Largest difference from torch.
    """

    prefix: str
    target: Target
    graphs: Mapping[str, Graph]
    signatures: Sequence[Signature]
    program: Program
    tolerance: float


def _generate(
    graphs: Mapping[str, Graph],
    params: Mapping[str, Array],
    target: Target,
    tuning_root: str | Path | None,
    prefix: str,
) -> Program:
    database = TuningDatabase.for_target(target, tuning_root)
    arguments = (dict(graphs), dict(params), target, database, prefix)
    try:
        return worker_for(1).call(make_program, *arguments, timeout_s=TIMEOUT_S)
    except RemoteError as error:
        raise CompileError("code generation failed", found=error.found) from error


def _build(
    model: _Model, examples: Mapping[str, _Example], scratch: Path, metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Write the folder `_NEW`, run it where that can be done, and return its manifest."""
    folder, tools = scratch / _NEW, toolchain.find(model.target)
    _write_sources(folder, model, examples)
    error: float | None = None
    code_bytes: int | None = None
    if isinstance(tools, Toolchain):
        code_bytes = _compile(folder, scratch, tools)
        error = _run(folder, scratch, tools, model, examples)
    manifest = _manifest(folder, model, metadata, tools, error, code_bytes)
    facts = _facts(manifest)
    (folder / "README.md").write_text(example.readme(model.prefix, model.signatures, model.target, facts))
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _check(graphs: Mapping[str, Graph], target: Target, folder: Path) -> None:
    """Refuse before the work what cannot be exported."""
    if not graphs or any(name not in _FUNCTIONS for name in graphs):
        raise InputError("no such function", expected=" or ".join(_FUNCTIONS), found=", ".join(graphs) or "none")
    if target.kind != "llvm":
        raise InputError("C is written for CPUs", where="target", expected="cpu or arm64", found=target.name)
    if folder.exists() and not _is_ours(folder):
        raise InputError(
            "this is not a folder that an earlier export wrote, so it is left alone",
            where=str(folder),
            expected="a new folder, or an exported one to replace",
            found="a folder" if folder.is_dir() else "a file",
        )
    for graph in graphs.values():
        require_expanded(graph)
        if len(graph.inputs) == 0 or len(graph.outputs) == 0:
            raise InputError("a function without inputs or outputs", expected="at least one of each")


def _is_ours(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        return not any(folder.iterdir()) or json.loads((folder / MANIFEST).read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _example(signature: Signature, graph: Graph, params: Mapping[str, Array]) -> _Example:
    """Draw inputs of a function and run torch: one call, or some steps of one stream."""
    if not signature.has_state:
        inputs = sample_inputs(graph)
        return _Example(
            {key: array[None] for key, array in inputs.items()},
            {key: array[None] for key, array in torch_outputs(graph, params, inputs).items()},
        )
    kinds = {key: node.types[0] for key, node in graph.inputs.items()}
    state: dict[str, Array] = {key: np.zeros(kinds[key].shape, _numpy(kinds[key].dtype)) for key in signature.state}
    given: list[dict[str, Array]] = []
    made: list[dict[str, Array]] = []
    for step in range(min(STEPS, signature.most_steps or STEPS)):
        inputs = sample_inputs(graph, seed=step) | state
        if POSITION in inputs:
            inputs[POSITION] = np.asarray(step, inputs[POSITION].dtype)
        outputs = torch_outputs(graph, params, inputs)
        state = {key: outputs[key] for key in state}
        given.append(inputs)
        made.append(outputs)
    return _Example(
        {
            argument.spec.name: np.stack([call[argument.spec.name] for call in given])
            for argument in signature.arguments_in
        },
        {
            argument.spec.name: np.stack([call[argument.spec.name] for call in made])
            for argument in signature.arguments_out
        },
    )


def _numpy(dtype: str) -> str:
    return "float32" if dtype == "bfloat16" else dtype


def _write_sources(folder: Path, model: _Model, examples: Mapping[str, _Example]) -> None:
    (folder / "data").mkdir(parents=True)
    texts = {
        "model.h": sources.header(model.prefix, model.signatures),
        "model.c": sources.glue(model.prefix, model.program, model.signatures, model.target),
        "weights.S": sources.weights_source(model.prefix),
        "main.c": example.main_source(model.prefix, model.signatures, model.tolerance),
        "CMakeLists.txt": sources.cmake(model.prefix),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "kernels.o").write_bytes(model.program.code)
    (folder / "weights.bin").write_bytes(model.program.weights)
    for signature in model.signatures:
        those = examples[signature.name]
        for role, arguments, arrays in (
            ("in", signature.arguments_in, those.inputs),
            ("out", signature.arguments_out, those.expected),
        ):
            for argument in arguments:
                array = np.asarray(arrays[argument.spec.name], argument.spec.dtype, order="C")
                path = folder / "data" / example.file_name(signature.name, role, argument)
                path.write_bytes(array.tobytes())


def _compile(folder: Path, scratch: Path, tools: Toolchain) -> int | None:
    """Compile the example; return the bytes of code where they can be told."""
    line = example.COMPILE_LINE.split()
    tools.compile([*line[:-1], str(scratch / "example")], folder)
    tools.compile(["-O2", "-std=c11", "-c", "model.c", "-o", str(scratch / "model.o")], folder)
    return tools.code_bytes(["kernels.o", str(scratch / "model.o")], folder)


def _run(folder: Path, scratch: Path, tools: Toolchain, model: _Model, examples: Mapping[str, _Example]) -> float:
    """Run every function on its example and return the largest difference from torch."""
    worst = 0.0
    for signature in model.signatures:
        files = [
            str(folder / "data" / example.file_name(signature.name, "in", argument))
            for argument in signature.arguments_in
        ]
        made = [str(scratch / f"{signature.name}.{argument.name}") for argument in signature.arguments_out]
        tools.run([str(scratch / "example"), signature.name, *files, *made], scratch)
        for argument, path in zip(signature.arguments_out, made, strict=True):
            expected = examples[signature.name].expected[argument.spec.name]
            found = np.fromfile(path, argument.spec.dtype).reshape(expected.shape)
            error = relative_error(found, expected)
            if not error <= model.tolerance:
                raise VerificationError(
                    "the exported model disagrees with torch",
                    where=f"{signature.name}, output {argument.spec.name}",
                    expected=f"at most {model.tolerance:g}",
                    found=f"{error:g}" if np.isfinite(error) else "values that are not finite",
                )
            worst = max(worst, error)
    return worst


def _manifest(
    folder: Path,
    model: _Model,
    metadata: Mapping[str, Any] | None,
    tools: Toolchain | str,
    error: float | None,
    code_bytes: int | None,
) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    compiled, ran = ("", "") if isinstance(tools, str) else (" ".join(tools.compiler), " ".join(tools.runner))
    why = tools if isinstance(tools, str) else ""
    return {
        "format": FORMAT,
        "format_version": 1,
        "name": model.prefix,
        "target": artifact.describe_target(model.target),
        "threads": 1,
        "functions": {s.name: _describe(s, model.graphs[s.name]) for s in model.signatures},
        "weight_bytes": len(model.program.weights),
        "memory_bytes": sources.memory_bytes(model.program),
        "code_bytes": code_bytes,
        "verification": {"error": error, "unverified": why, "compiler": compiled, "emulator": ran},
        "kernels": {function.name: list(function.kernels) for function in model.program.functions},
        "versions": machine.versions(),
        "metadata": dict(metadata or {}),
        "sha256": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        },
    }


def _describe(signature: Signature, graph: Graph) -> dict[str, Any]:
    return {
        "inputs": [argument.spec.to_dict() for argument in signature.arguments_in],
        "outputs": [argument.spec.to_dict() for argument in signature.arguments_out],
        "state_bytes": signature.state_bytes,
        "most_steps": signature.most_steps,
        "graph_hash": canonical_hash(graph),
    }


def _facts(manifest: Mapping[str, Any]) -> list[str]:
    """Sum the manifest up for the README."""
    checked = manifest["verification"]
    verdict = f"Not run yet: {checked['unverified']}."
    if checked["error"] is not None:
        how = f"`{checked['compiler']}`" + (f" and run by `{checked['emulator']}`" if checked["emulator"] else "")
        verdict = f"Compiled by {how}, it differed from torch by {checked['error']:.1e} of the output's scale."
    code = "" if manifest["code_bytes"] is None else f", {manifest['code_bytes'] / 1e3:.1f} KB of code"
    weights, memory = manifest["weight_bytes"] / 1e6, manifest["memory_bytes"] / 1e6
    return [verdict, f"{weights:.2f} MB of weights, {memory:.2f} MB of static memory{code}."]
