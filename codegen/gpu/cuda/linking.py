"""Kernels in CUDA C++ beside those that TVM generates: compiled once for a module, and linked into its library."""

from __future__ import annotations

import json
from typing import Any, Final

from codegen._tvm import IRModule, tvm
from codegen.gpu.cuda import nvcc
from codegen.gpu.cuda.sites import CODE_ATTRIBUTE

_TAGS: Final = ("blockIdx.x", "blockIdx.y", "threadIdx.x", "tirx.use_dyn_shared_memory")


def attach_code(module: IRModule, architecture: str) -> IRModule:
    """Compile the kernels that a module's functions start, and add them to what its library will hold.

    Raises:
        CompileError: The compiler refuses.
    """
    found: dict[str, dict[str, Any]] = {}
    for function in module.functions.values():
        if CODE_ATTRIBUTE in (function.attrs or {}):
            found |= {code["entry"]: code for code in json.loads(str(function.attrs[CODE_ATTRIBUTE]))}
    if not found:
        return module
    headers = dict.fromkeys(f'#include "{code["header"]}"' for code in found.values())
    source = "\n".join([*headers, *(code["text"] for code in found.values())])
    fatbin, _ = nvcc.compile_source(source, [architecture])
    described = {
        entry: {"name": "", "arg_types": ["handle"] * code["pointers"], "launch_param_tags": list(_TAGS)}
        for entry, code in found.items()
    }
    metadata = json.dumps({"tvm_version": tvm.__version__, "func_info": described})
    functions = tvm.get_global_func("runtime.LoadMetaDataFromJSON")(metadata)
    made = tvm.get_global_func("ffi.Module.create.cuda")(fatbin, "fatbin", functions, {})
    return module.with_attr("external_mods", [made])
