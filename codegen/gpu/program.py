"""A compiled model as a list of launches: all that a program without this tool needs to run it.

`program.json`, of any other function than `forward` `program.FUNCTION.json`, holds

- `language` and `source`: what the kernels are written in, and the member that holds them
- `buffers`: all memory, in order: inputs, weights and outputs with name, dtype and shape, and `storage`, which values
  between kernels share, with its size in bytes
- `outputs`: name, dtype and shape of each, and the number of the buffer that holds it
- `launches`: in order, one after the other: name of the kernel, the numbers of its buffers, work-groups (`grid`) and
  threads of each (`block`) along x, y and z, and the bytes that the threads of a work-group share, which the source
  declares

Tensors are row-major without gaps; bfloat16 lies as its bits in uint16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from codegen._tvm import DeviceKernel
from codegen.kernels.base import storage_dtype
from codegen.manifest import FORWARD
from codegen.memory import plan_memory
from codegen.packing import PackedWeights
from codegen.selection.select import aliases
from codegen.selection.state import KernelCall, Static, Table
from ir.errors import CompileError
from ir.graph import Value

if TYPE_CHECKING:
    from codegen.lower import Lowered

SOURCES: Final = {"opencl": "kernels.cl", "metal": "kernels.metal"}
"""Member that holds the source of a kind of device."""


def member(function: str) -> str:
    """Return the member of an artifact that holds the program of a function."""
    return "program.json" if function == FORWARD else f"program.{function}.json"


def make_program(
    lowered: Lowered,
    weights: PackedWeights,
    names: Mapping[str, str],
    kernels: Mapping[str, Sequence[DeviceKernel]],
    language: str,
) -> dict[str, Any]:
    """Lay the calls of a lowered graph out as launches.

    Args:
        lowered: The graph as kernels.
        weights: Its packed weights.
        names: What the artifact calls each of them.
        kernels: Device kernels by `Kernel.key`, in the order in which they are started.
        language: Kind of the device.
    """
    layout = _Buffers(lowered, weights, names)
    launches: list[dict[str, Any]] = []
    for call in lowered.calls:
        operands = [layout.operand(call, index) for index in range(len(call.operands))]
        places = {f"x{index}": number for index, number in enumerate(operands)}
        places |= {f"y{index}": layout.result(call, index) for index in range(len(call.results))}
        for kernel in kernels[call.kernel.key]:
            launches.append(
                {
                    "kernel": kernel.name,
                    "arguments": [places[argument] for argument in kernel.arguments],
                    "grid": list(kernel.grid),
                    "block": list(kernel.block),
                    "shared_bytes": kernel.shared_bytes,
                }
            )
    return {
        "language": language,
        "source": SOURCES[language],
        "buffers": layout.buffers,
        "outputs": layout.outputs(),
        "launches": launches,
    }


class _Buffers:
    """Memory of a program, numbered as it is met."""

    def __init__(self, lowered: Lowered, weights: PackedWeights, names: Mapping[str, str]) -> None:
        self.lowered, self.weights, self.names = lowered, weights, names
        self.plan, self.alias = plan_memory(lowered.graph, lowered.calls), aliases(lowered.graph, lowered.calls)
        self.buffers: list[dict[str, Any]] = []
        self._numbers: dict[Any, int] = {}
        self._kept = {self.alias.get(value, value): name for name, value in lowered.graph.outputs}
        for name, node in lowered.graph.inputs.items():
            kind = node.types[0]
            fields = {"kind": "input", "name": name, "dtype": kind.dtype, "shape": list(kind.shape)}
            self._number(node.results[0], lambda fields=fields: fields)

    def operand(self, call: KernelCall, index: int) -> int:
        """Return the number of the memory that a call reads."""
        operand = call.operands[index]
        if isinstance(operand, Static | Table):
            name = self.weights.name(call, index)
            array = self.weights.arrays[name]
            fields = {"kind": "weight", "name": self.names[name], "dtype": array.dtype.name, "shape": list(array.shape)}
            return self._number(("weight", name), lambda: fields)
        return self._numbers[self._place(self.alias.get(operand, operand))]

    def result(self, call: KernelCall, index: int) -> int:
        """Return the number of the memory that a call writes."""
        value, kind = call.results[index], call.kernel.outputs[index]
        if value in self.plan.places:
            size = self.plan.storages[self.plan.places[value]]
            return self._number(self._place(value), lambda: {"kind": "storage", "bytes": size})
        fields = {"kind": "output", "dtype": storage_dtype(kind.dtype), "shape": list(kind.shape)}
        return self._number(value, lambda: fields)

    def outputs(self) -> list[dict[str, Any]]:
        """Return name, buffer and shape of each output."""
        graph = self.lowered.graph
        return [
            {
                "name": name,
                "buffer": self._numbers[self._place(self.alias.get(value, value))],
                "dtype": graph.type_of(value).dtype,
                "shape": list(graph.type_of(value).shape),
            }
            for name, value in graph.outputs
        ]

    def _place(self, value: Value) -> Any:
        return ("storage", self.plan.places[value]) if value in self.plan.places else value

    def _number(self, key: Any, fields: Callable[[], dict[str, Any]]) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.buffers)
            self.buffers.append(fields())
        return self._numbers[key]


def check_coverage(calls: Sequence[KernelCall], kernels: Mapping[str, Sequence[DeviceKernel]]) -> None:
    """Check that every call runs on the device, all of its work inside threads.

    Raises:
        CompileError: Some kernels do not; all of them are named.
    """
    missing = sorted({call.kernel.key for call in calls if not kernels.get(call.kernel.key)})
    if missing:
        raise CompileError(
            "kernels are not bound to threads of the device",
            where=missing[0],
            expected="every kernel to be started on the device",
            found=f"{len(missing)} that are not: {', '.join(missing)[:400]}",
        )
