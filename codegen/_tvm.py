"""The one module that imports the TVM compiler: TVM renames its modules between releases, so only this file follows.

It imports TVM and nothing else heavy, and registers one lowering pipeline. Running an artifact does not come through
here: the runtime alone is enough for that, and `codegen.runtime` loads it by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

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
    tirx: Any
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
    "KERNEL_ATTRIBUTE",
    "TIR_PIPELINE",
    "Buffer",
    "Expr",
    "IRBuilder",
    "IRModule",
    "PassContext",
    "PrimFunc",
    "R",
    "T",
    "Target",
    "compile_functions",
    "device_array",
    "flatten_kernels",
    "pointer_type",
    "relax",
    "te",
    "tir_builder",
    "tirx",
    "topi",
    "tvm",
    "write_object",
]

TIR_PIPELINE: Final = "nas_kernels"
"""Name of the TIR pipeline that knows generated kernels; give it to `tvm.compile` as `tir_pipeline`."""

KERNEL_ATTRIBUTE: Final = "nas.kernel"
"""Function attribute of a generated kernel: fully lowered already, free of blocks and of loops to transform."""


def device_array(array: np.ndarray) -> Any:
    """Copy a numpy array into a tensor that kernels and the virtual machine take."""
    return tvm.runtime.tensor(np.asarray(array, order="C"))


def compile_functions(functions: dict[str, PrimFunc], target: Any) -> Any:
    """Compile bare TIR functions into one library; each is called by its name with its operands.

    Args:
        functions: Function by symbol.
        target: What the library runs on.

    Returns:
        An executable: `executable[name](*tensors)` runs one function.
    """
    named = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
    return tvm.compile(IRModule(named), target, tir_pipeline=TIR_PIPELINE)


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
    lower_kernels = tvm.transform.Sequential(
        [
            tirx.transform.FlattenBuffer(),
            tirx.transform.StmtSimplify(),  # makes vector indices contiguous ramps again
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
        ]
    )

    @tvm.transform.module_pass(opt_level=0)
    def pipeline(module: Any, _context: Any) -> Any:
        functions = dict(module.functions.items())
        kernels = {name: f for name, f in functions.items() if KERNEL_ATTRIBUTE in f.attrs}
        others = {name: f for name, f in functions.items() if name not in kernels}
        lowered = default(IRModule(others, attrs=module.attrs))
        lowered.update(lower_kernels(IRModule(kernels, attrs=module.attrs)))
        return lowered

    return pipeline, finalize_host, finalize_device


_pipelines.register_tir_pipeline(TIR_PIPELINE, _kernel_pipeline)
