"""Kernels as plain C functions in one object file: pointers in, nothing of TVM outside.

A kernel becomes `void symbol(const void *x0, ..., void *y0, void *workspace)`. Parallel loops run on the calling
thread; memory that a kernel needs while it runs, which TVM would allocate, lies in the workspace. Pointers need the
alignment of their elements only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from codegen._tvm import PrimFunc, flatten_kernels, pointer_type, tirx, with_pointers, write_object
from codegen.memory import aligned
from codegen.targets.base import Target

_ON_STACK_BYTES: Final = 512  # TVM allocates what is much larger by itself


@dataclass(frozen=True)
class ObjectCode:
    """Kernels of a program, compiled.

    Attributes:
        code: The object file.
        workspace_bytes: Scratch memory of the kernel that needs most.
    """

    code: bytes
    workspace_bytes: int


def compile_kernels(kernels: Mapping[str, PrimFunc], target: Target) -> ObjectCode:
    """Compile kernels, each by its symbol, into one object file.

    Raises:
        RuntimeError: LLVM refuses.
    """
    plain: dict[str, PrimFunc] = {}
    most = 0
    for symbol, kernel in flatten_kernels(kernels, target.to_tvm()).items():
        body = _Body()
        statement = body.rewrite(kernel.body)
        most = max(most, body.workspace_bytes)
        plain[symbol] = with_pointers(kernel, statement, [body.workspace])
    with tempfile.TemporaryDirectory(prefix="nas-") as folder:
        path = Path(folder) / "kernels.o"
        write_object(plain, target.to_tvm(), path)
        return ObjectCode(path.read_bytes(), most)


@dataclass
class _Body:
    """Rewrites the statements of one kernel."""

    workspace: Any = field(default_factory=lambda: tirx.Var("workspace", pointer_type("uint8")))
    workspace_bytes: int = 0

    def rewrite(self, statement: Any) -> Any:
        """Return a statement without parallel loops and large allocations."""
        if isinstance(statement, tirx.SeqStmt):
            return tirx.SeqStmt([self.rewrite(part) for part in statement.seq])
        if isinstance(statement, tirx.For):
            return self._loop(statement)
        if isinstance(statement, tirx.IfThenElse):
            otherwise = statement.else_case
            return tirx.IfThenElse(
                statement.condition,
                self.rewrite(statement.then_case),
                None if otherwise is None else self.rewrite(otherwise),
            )
        if isinstance(statement, tirx.While):
            return tirx.While(statement.condition, self.rewrite(statement.body))
        if isinstance(statement, tirx.AttrStmt):
            body = self.rewrite(statement.body)
            return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, body)
        if isinstance(statement, tirx.AllocBuffer):
            return self._allocation(statement)
        return statement

    def _loop(self, loop: Any) -> Any:
        kind = tirx.ForKind.SERIAL if loop.kind == tirx.ForKind.PARALLEL else loop.kind
        body = self.rewrite(loop.body)
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, kind, body, loop.thread_binding, loop.annotations, loop.step
        )

    def _allocation(self, statement: Any) -> Any:
        buffer = statement.buffer
        elements = 1
        for size in buffer.shape:
            elements *= int(size)
        size_bytes = -(-elements * buffer.dtype.bits // 8)
        if size_bytes <= _ON_STACK_BYTES:
            return statement
        start = self.workspace_bytes
        self.workspace_bytes += aligned(size_bytes)
        place = tirx.handle_add_byte_offset(self.workspace, tirx.const(start, "int32"))
        return tirx.DeclBuffer(buffer, data=tirx.reinterpret(pointer_type(buffer.dtype), place))
