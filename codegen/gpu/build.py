"""Build graphs for graphics processors: host library, device source, programs of launches, and a run where possible.

Runs in a worker process, as `codegen.build` does for other targets.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from codegen import lower
from codegen._tvm import DEVICE_CONFIG, DEVICE_PIPELINE, DeviceKernel, PassContext, Target, recorded_kernels, relax
from codegen.build import BuiltFunction, BuiltModel, Parts, SharedWeights, lower_functions
from codegen.cross import linker
from codegen.gpu.execute import run_program, why_not_run
from codegen.gpu.program import SOURCES, check_coverage, make_program, member
from codegen.kernels.base import Array
from codegen.lower import Lowered
from codegen.memory import plan_memory
from codegen.targets.base import Target as NasTarget
from codegen.tuning import TuningDatabase
from ir.errors import CompileError, TargetUnavailable
from ir.graph import Graph
from ir.hashing import canonical_hash

SHARED: Final = "shared library"
OBJECTS: Final = "tar of objects"
"""What the host library is: linked, or objects to be linked on a machine of the device's system."""


@dataclass(frozen=True)
class DeviceCode:
    """What comes out for a device.

    Attributes:
        library: Host library with the executable of the virtual machine.
        form: `SHARED` or `OBJECTS`.
        source: Source of the kernels.
        kernels: How they are started, by the key of their workload.
    """

    library: bytes
    form: str
    source: str
    kernels: Mapping[str, Sequence[DeviceKernel]]


def build_and_run(
    graphs: Mapping[str, Graph],
    params: Mapping[str, Array],
    target: NasTarget,
    database: TuningDatabase,
    inputs: Mapping[str, Mapping[str, Array]],
) -> tuple[BuiltModel, dict[str, dict[str, Array]] | None]:
    """Generate the code of graphs that share parameters for a device, and run each once where a device is here.

    Returns:
        What was built, and the outputs by function and name; None where the code cannot be run here.

    Raises:
        CompileError: TVM or a linker refuses, or a kernel is not bound to threads.
        KernelCrash: A program ended its process.
    """
    assert target.gpu is not None
    parts, _ = lower_functions(graphs, params, target, database)
    code = compile_device(parts, target)
    store, functions, programs = SharedWeights(), dict[str, BuiltFunction](), dict[str, dict[str, Any]]()
    for name, (lowered, packed) in parts.items():
        names = store.add_all(packed.arrays)
        programs[name] = make_program(lowered, packed, names, code.kernels, target.gpu.kind) | {"host": code.form}
        memory = plan_memory(lowered.graph, lowered.calls).describe(store.of(names))
        graph_hash = canonical_hash(graphs[name])
        functions[name] = BuiltFunction(tuple(names.values()), _describe(lowered, code), memory, graph_hash)
    source = SOURCES[target.gpu.kind]
    extras = {member(name): json.dumps(program, indent=1).encode() for name, program in programs.items()}
    built = BuiltModel(code.library, store.arrays, functions, {source: code.source.encode(), **extras})
    if why_not_run(target.gpu):
        return built, None
    return built, {
        name: run_program(program, code.source, inputs[name], store.arrays) for name, program in programs.items()
    }


def compile_device(parts: Parts, target: NasTarget) -> DeviceCode:
    """Generate host library and device source of some functions.

    Raises:
        CompileError: TVM or a linker refuses, or a kernel is not bound to threads.
    """
    assert target.gpu is not None
    kind = target.gpu.kind
    module, tvm_target = lower.relax_module(parts, target), Target(target.to_tvm())
    try:
        with tvm_target, PassContext(opt_level=3, config=DEVICE_CONFIG), recorded_kernels() as found:
            passes = lower.relax_pipeline()
            executable = relax.build(module, tvm_target, relax_pipeline=passes, tir_pipeline=DEVICE_PIPELINE)
        sources = executable.mod._collect_from_import_tree(lambda part: part.kind == kind)
        library, form = _export(executable, target)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CompileError("code generation failed", found=str(error)[-2000:]) from error
    kernels: dict[str, list[DeviceKernel]] = {}
    for kernel in found:
        kernels.setdefault(kernel.workload, []).append(kernel)
    for lowered, _ in parts.values():
        check_coverage(lowered.calls, kernels)
    return DeviceCode(library, form, "\n".join(source.inspect_source() for source in sources), kernels)


def _describe(lowered: Lowered, code: DeviceCode) -> list[dict[str, Any]]:
    """List the kernels of a function, each with the names that it is started by."""
    return [
        record | {"launches": [kernel.name for kernel in code.kernels[record["kernel"]]]}
        for record in lower.describe(lowered)
    ]


def _export(executable: Any, target: NasTarget) -> tuple[bytes, str]:
    """Link the host library where a linker is here, else keep its objects."""
    options = _link_options(target)
    with tempfile.TemporaryDirectory(prefix="nas-") as folder:
        path = Path(folder) / ("library.tar" if options is None else "library.so")
        executable.export_library(str(path), **(options or {}))
        return path.read_bytes(), OBJECTS if options is None else SHARED


def _link_options(target: NasTarget) -> dict[str, Any] | None:
    """Return what links for the processor beside the device; None where nothing here does."""
    if not target.is_foreign:
        return {}
    if "apple" in target.triple:
        return None
    try:
        linker(target)
    except TargetUnavailable:
        return None
    return {"fcompile": lower.link_for(target)}
