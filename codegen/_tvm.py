"""The one module that imports the TVM compiler: TVM renames its modules between releases, so only this file follows.

It imports TVM and nothing else heavy, and registers one lowering pipeline. Running an artifact does not come through
here: the runtime alone is enough for that, and `codegen.runtime` loads it by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tvm_ffi import structural_walk

from codegen.placement import KDL_CPU

if TYPE_CHECKING:
    # TVM's annotations say less than they seem to (its expressions have no operators there), so type checkers see Any.
    IRBuilder: Any
    IRModule: Any
    PassContext: Any
    R: Any
    T: Any
    Target: Any
    _pipelines: Any = None  # used at import
    relax: Any
    te: Any
    tir_builder: Any
    tirx: Any = None  # used at import
    topi: Any
    tvm: Any

    class Expr(Any):
        """Scalar or vector expression."""

    class Buffer(Expr):
        """Multi-dimensional memory; indexing it makes a load."""

    class PrimFunc(Any):
        """TIR function."""
else:
    import tvm
    from tvm import relax, te, tirx, topi
    from tvm.ir import Expr, IRModule
    from tvm.ir.transform import PassContext
    from tvm.script import relax as R
    from tvm.script import tirx as T
    from tvm.script.ir_builder import IRBuilder
    from tvm.target import Target
    from tvm.tirx import Buffer, PrimFunc
    from tvm.tirx import compilation_pipeline as _pipelines
    from tvm.tirx.script import builder as tir_builder

__all__ = [
    "DEVICE_CONFIG",
    "DEVICE_PIPELINE",
    "INTERNAL_ATTRIBUTE",
    "KERNEL_ATTRIBUTE",
    "TIR_PIPELINE",
    "WORKLOAD_ATTRIBUTE",
    "Buffer",
    "DeviceKernel",
    "Expr",
    "IRBuilder",
    "IRModule",
    "PassContext",
    "PrimFunc",
    "R",
    "T",
    "Target",
    "call_internal",
    "compile_functions",
    "device_array",
    "flatten_kernels",
    "pointer_type",
    "recorded_kernels",
    "relax",
    "te",
    "tensor_function",
    "tir_builder",
    "tirx",
    "topi",
    "tvm",
    "with_pointers",
    "write_object",
]

TIR_PIPELINE: Final = "nas_kernels"
"""Name of the TIR pipeline that knows generated kernels; give it to `tvm.compile` as `tir_pipeline`."""

KERNEL_ATTRIBUTE: Final = "nas.kernel"
"""Function attribute of a generated kernel: fully lowered already, free of blocks and of loops to transform."""

INTERNAL_ATTRIBUTE: Final = "nas.internal"
"""Function attribute of a kernel that only functions of its own library call: `call_internal`."""

DEVICE_CONFIG: Final[dict[str, Any]] = {"tirx.UnrollLoop": {"explicit_unroll": False}}
"""Options of a `PassContext` for graphics processors: what loops to write out is left to the device's compiler."""

DEVICE_PIPELINE: Final = "nas_device"
"""Name of the TIR pipeline for graphics processors, TVM's own, which notes down kernels for `recorded_kernels`."""

WORKLOAD_ATTRIBUTE: Final = "nas.workload"
"""Function attribute with the key of the workload that a function of a graphics processor computes."""


@dataclass(frozen=True)
class DeviceKernel:
    """A kernel of a graphics processor as it is started.

    Attributes:
        workload: Key of the workload that it computes, alone or with others that follow it.
        name: In the device's source.
        arguments: Names of its buffers, in order: those that the generator gave the operands.
        grid: Work-groups along x, y and z.
        block: Threads of a work-group along x, y and z.
        shared_bytes: Memory that the threads of a work-group share.
    """

    workload: str
    name: str
    arguments: tuple[str, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


_DATA: Final = 1  # TVM's number of a tensor's field
_FAILURE: Final = "a kernel found no memory, or its threads could not be started"
_RECORDS: Final[list[list[DeviceKernel]]] = []


@contextmanager
def recorded_kernels() -> Iterator[list[DeviceKernel]]:
    """Collect the kernels of what is compiled inside through `DEVICE_PIPELINE`, in the order of their functions."""
    kernels: list[DeviceKernel] = []
    _RECORDS.append(kernels)
    try:
        yield kernels
    finally:
        _RECORDS.remove(kernels)


def device_array(array: np.ndarray) -> Any:
    """Copy a numpy array into a tensor that kernels and the virtual machine take."""
    return tvm.runtime.tensor(np.asarray(array, order="C"))


def compile_functions(functions: dict[str, PrimFunc], target: Any) -> Any:
    """Compile bare TIR functions into one library; each is called by its name with its operands.

    Args:
        functions: Function by symbol. Generated kernels take their tensors unchecked.
        target: What the library runs on.

    Returns:
        An executable: `executable[name](*tensors)` runs one function.
    """
    named: dict[str, PrimFunc] = {}
    for name, function in functions.items():
        if KERNEL_ATTRIBUTE not in function.attrs:
            named[name] = function.with_attr("global_symbol", name)
            continue
        symbol = f"{name}_code"
        named[symbol] = function.with_attrs({"global_symbol": symbol, INTERNAL_ATTRIBUTE: True})
        with tensor_function(len(function.params)) as (builder, pointers):
            call_internal(symbol, pointers)
        named[name] = builder.get().with_attr("global_symbol", name)
    return tvm.compile(IRModule(named), target, tir_pipeline=TIR_PIPELINE)


@contextmanager
def tensor_function(count: int) -> Iterator[tuple[Any, list[Any]]]:
    """Write the body of a function of tensors that takes them as they are: compiling checks would take longest.

    Args:
        count: Tensors.

    Yields:
        The builder, whose `get()` is the function afterwards, and the memory of each tensor.
    """
    with IRBuilder() as builder, tir_builder.prim_func(private=True):
        tir_builder.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, KERNEL_ATTRIBUTE: True})
        tensors = [tir_builder.arg(f"x{number}", tir_builder.handle()) for number in range(count)]
        fields = (tirx.tvm_struct_get(tensor, 0, _DATA, "handle") for tensor in tensors)
        yield builder, [tir_builder.Bind(field) for field in fields]


def flatten_kernels(kernels: Mapping[str, PrimFunc], target: dict[str, Any]) -> dict[str, PrimFunc]:
    """Return generated kernels by symbol with one-dimensional buffers, bound to the target but not to a way to call."""
    here = _with_itself_as_host(target)
    module = IRModule({name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()})
    passes = [tirx.transform.BindTarget(here), tirx.transform.FlattenBuffer(), tirx.transform.StmtSimplify()]
    flat = tvm.transform.Sequential(passes)(module)
    return {name.name_hint: kernel for name, kernel in flat.functions.items()}


def write_object(functions: Mapping[str, PrimFunc], target: dict[str, Any], path: Path) -> None:
    """Compile functions of pointers, each called by its symbol as a C function, into an object file."""
    here = _with_itself_as_host(target)
    attributes = {"tirx.noalias": True, "target": here}
    named = {name: f.with_attrs({"global_symbol": name, **attributes}) for name, f in functions.items()}
    _, finalize_host, _ = _pipelines.get_tir_pipeline("default")
    tvm.get_global_func("target.build.llvm")(finalize_host()(IRModule(named)), here).write_to_file(str(path), "o")


def call_internal(symbol: str, pointers: Sequence[Any]) -> None:
    """Write a call of an internal kernel on the memory of its buffers, and the end of the function where it fails."""
    with tir_builder.Assert(tirx.call_extern("int32", symbol, *pointers) == 0, _FAILURE):
        pass


def with_pointers(kernel: PrimFunc, body: Any, more: Sequence[Any] = (), ret_type: Any = None) -> PrimFunc:
    """Return a function that takes the memory of a flat kernel's buffers instead of the buffers.

    Args:
        kernel: A generated kernel with one-dimensional buffers.
        body: What it does.
        more: Further parameters.
        ret_type: What it returns; what the kernel does where None.
    """
    pointers = [tirx.Var(f"{buffer.name}_memory", pointer_type(buffer.dtype)) for buffer in kernel.params]
    declared = [tirx.DeclBuffer(buffer, data=at) for buffer, at in zip(kernel.params, pointers, strict=True)]
    return tirx.PrimFunc([*pointers, *more], tirx.SeqStmt([*declared, body]), ret_type or kernel.ret_type)


def pointer_type(dtype: str) -> Any:
    """Return the type of a pointer to elements in the memory of a CPU."""
    return T.handle(str(dtype), "global").ty


def _with_itself_as_host(target: dict[str, Any]) -> Any:
    return Target(target).with_host(Target(target))


def _kernel_pipeline() -> tuple[Any, Any, Any]:
    """Lower generated kernels by the few passes they need, everything else by TVM's default pipeline.

    The default pipeline takes up to half a second for one attention kernel, nearly all of it in passes that find
    nothing.
    """
    default, finalize_host, finalize_device = _pipelines.get_tir_pipeline("default")
    simplify = tvm.transform.Sequential(
        [tirx.transform.FlattenBuffer(), tirx.transform.StmtSimplify()]  # makes vector indices contiguous ramps again
    )
    pack = tvm.transform.Sequential(
        [tirx.transform.AnnotateEntryFunc(), tirx.transform.SplitHostDevice(), tirx.transform.MakePackedAPI()]
    )

    @tvm.transform.module_pass(opt_level=0)
    def pipeline(module: Any, _context: Any) -> Any:
        functions = dict(module.functions.items())
        kernels = {name: f for name, f in functions.items() if KERNEL_ATTRIBUTE in f.attrs}
        others = {name: f for name, f in functions.items() if name not in kernels}
        lowered = default(IRModule(others, attrs=module.attrs))
        simple = dict(simplify(IRModule(kernels, attrs=module.attrs)).functions.items())
        internal = {name: f for name, f in simple.items() if INTERNAL_ATTRIBUTE in f.attrs}
        called = {name: f for name, f in simple.items() if name not in internal}
        lowered.update(pack(IRModule(called, attrs=module.attrs)))
        lowered.update(IRModule({name: _internal(f) for name, f in internal.items()}, attrs=module.attrs))
        return lowered

    return pipeline, finalize_host, finalize_device


def _internal(kernel: PrimFunc) -> PrimFunc:
    """Return a flat kernel as a function of pointers that returns 0, or less where memory or threads are missing."""
    body = tirx.SeqStmt([kernel.body, tirx.Return(tirx.const(0, "int32"))])
    for key, value in (("device_id", 0), ("device_type", KDL_CPU)):  # whose memory it allocates
        body = tirx.AttrStmt(tirx.const(0, "int32"), key, tirx.const(value, "int32"), body)
    function = with_pointers(kernel, body, ret_type=tvm.ir.PrimType("int32"))
    return function.with_attrs(dict(kernel.attrs.items()))


def _device_pipeline() -> tuple[Any, Any, Any]:
    """Lower by TVM's default pipeline and note down the kernels that come out."""
    default, finalize_host, finalize_device = _pipelines.get_tir_pipeline("default")

    @tvm.transform.module_pass(opt_level=0)
    def pipeline(module: Any, _context: Any) -> Any:
        lowered = default(module)
        if _RECORDS:
            workloads = {name.name_hint: f.attrs.get(WORKLOAD_ATTRIBUTE, "") for name, f in module.functions.items()}
            kernels = [f for f in lowered.functions.values() if "tirx.kernel_launch_params" in f.attrs]
            _RECORDS[-1].extend(_read_kernel(kernel, workloads) for kernel in kernels)
        return lowered

    return pipeline, finalize_host, finalize_device


def _read_kernel(function: PrimFunc, workloads: Mapping[str, str]) -> DeviceKernel:
    """Read how a lowered kernel is started off its text of threads and allocations."""
    extents: dict[str, int] = {}
    shared: list[int] = []

    def thread(node: Any) -> None:
        if node.attr_key == "thread_extent":
            extents[str(node.node.thread_tag)] = int(node.value)

    def allocation(node: Any) -> None:
        if str(node.buffer.scope()).startswith("shared"):
            elements = 1
            for size in node.buffer.shape:
                elements *= int(size)
            shared.append(elements * (node.buffer.dtype.bits // 8))

    structural_walk(function.body, [(tirx.AttrStmt, thread), (tirx.AllocBuffer, allocation)])

    def along(kind: str) -> tuple[int, int, int]:
        x, y, z = (extents.get(f"{kind}.{axis}", 1) for axis in "xyz")
        return x, y, z

    arguments = tuple(str(param.name).removesuffix("_ptr") for param in function.params)
    name = str(function.attrs["global_symbol"])
    workload = workloads.get(re.sub(r"_kernel(_\d+)?$", "", name), "")
    return DeviceKernel(str(workload), name, arguments, along("blockIdx"), along("threadIdx"), sum(shared))


def _round_to_even(call: Any) -> Any:
    """Metal calls it rint."""
    return tirx.call_pure_extern(call.ty, "rint", *call.args)


tirx.register_intrin_lowering("tirx.nearbyint", target="metal", f=_round_to_even, level=99)
_pipelines.register_tir_pipeline(TIR_PIPELINE, _kernel_pipeline)
_pipelines.register_tir_pipeline(DEVICE_PIPELINE, _device_pipeline)
