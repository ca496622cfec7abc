"""A function of a model as one function of machine code: its kernels one after the other, on memory that was planned.

Between two kernels lie a few instructions. The virtual machine that calls the function, checks its inputs and gives it
memory has one step to do instead of several for each kernel, which together would take longer than a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from codegen._tvm import INTERNAL_ATTRIBUTE, PrimFunc, call_internal, relax, tensor_function, tirx
from codegen._tvm import tir_builder as T
from codegen.kernels.base import storage_dtype
from codegen.memory import plan_memory
from codegen.packing import PackedWeights
from codegen.selection.select import aliases
from codegen.selection.state import KernelCall, Static, Table
from ir.graph import Graph, Value

_OPAQUE: Final = "getpagesize"
"""A function of the C library that LLVM cannot look into. Where it puts small kernels into their caller, it would
otherwise take TVM's marks of buffers to say that one kernel reads nothing that another has written, and swap them."""

_Operand = tuple[str, Value | str]
"""A tensor that the function takes: what it is (an input, a weight, made for the caller, or all the memory between
kernels) and whose."""

_MEMORY: Final[_Operand] = ("memory", "")


Generated = tuple[Hashable, Callable[[], PrimFunc]]
"""What tells a kernel with its knobs from others, and what generates it."""


@dataclass(frozen=True)
class NativeWriter:
    """Writes functions into a module; kernels that they have in common are there once.

    Attributes:
        builder: The module.
    """

    builder: Any
    _symbols: dict[Hashable, str] = field(default_factory=dict[Hashable, str])

    def write(
        self,
        symbol: str,
        graph: Graph,
        calls: Sequence[KernelCall],
        weights: PackedWeights,
        generated: Callable[[KernelCall], Generated],
    ) -> None:
        """Write a function of a graph's inputs and of the weights in the order in which its calls read them."""
        function = _Function(graph, calls, weights)
        inputs = {
            ("input", node.results[0]): relax.Var(name, relax.TensorType(node.types[0].shape, node.types[0].dtype))
            for name, node in graph.inputs.items()
        }
        bound = {
            ("weight", name): relax.Var(f"w{number}", relax.TensorType(array.shape, array.dtype.name))
            for number, (name, array) in enumerate(function.weights.items())
        }
        symbols = [self._symbol(call, *generated(call)) for call in calls]
        code = self.builder.add_func(function.prim_func(symbols), f"{symbol}_kernels")
        with self.builder.function(symbol, [*inputs.values(), *bound.values()], pure=False):
            given = {**inputs, **bound}
            for operand, (shape, dtype) in function.operands.items():
                if operand not in given:
                    made = relax.op.builtin.alloc_tensor(relax.ShapeExpr(shape), dtype, 0)
                    given[operand] = self.builder.emit(made)
            arguments = [given[operand] for operand in function.operands]
            self.builder.emit(relax.Call(relax.ExternFunc(code.name_hint), arguments, ty_args=[relax.TupleType([])]))
            results = [
                self._read(given[operand], graph.type_of(value).shape)
                for operand, (_, value) in zip(function.results, graph.outputs, strict=True)
            ]
            self.builder.emit_func_output(results[0] if len(results) == 1 else relax.Tuple(results))

    def _symbol(self, call: KernelCall, identity: Hashable, generate: Callable[[], PrimFunc]) -> str:
        if identity not in self._symbols:
            function = generate().with_attr(INTERNAL_ATTRIBUTE, True)
            self._symbols[identity] = self.builder.add_func(function, call.kernel.symbol[:80]).name_hint
        return self._symbols[identity]

    def _read(self, made: Any, shape: tuple[int, ...]) -> Any:
        current = tuple(int(size) for size in made.ty.shape)
        return made if current == shape else self.builder.emit(relax.op.reshape(made, shape))


class _Place(NamedTuple):
    """An operand, and the byte of the memory between kernels."""

    operand: _Operand
    start: int = 0


class _Function:
    """The operands of one function, and which of them each kernel takes.

    Attributes:
        operands: Shape and dtype of each operand, in order.
        results: For each output of the graph, the operand in which it lies.
        weights: Weights by name.
    """

    def __init__(self, graph: Graph, calls: Sequence[KernelCall], weights: PackedWeights) -> None:
        alias, plan = aliases(graph, calls), plan_memory(graph, calls)
        self.operands: dict[_Operand, tuple[tuple[int, ...], str]] = {}
        self.weights = {
            name: weights.arrays[name]
            for call in calls
            for name in (weights.name(call, i) for i, o in enumerate(call.operands) if isinstance(o, Static | Table))
        }
        starts = plan.starts
        if starts:
            self.operands[_MEMORY] = (plan.memory_bytes,), "uint8"
        places: dict[Value, _Place] = {}
        for node in graph.inputs.values():
            places[node.results[0]] = _Place(("input", node.results[0]))
            self.operands[places[node.results[0]].operand] = node.types[0].shape, storage_dtype(node.types[0].dtype)
        self.operands |= {("weight", name): (array.shape, array.dtype.name) for name, array in self.weights.items()}
        self._calls: list[list[_Place]] = []
        for call in calls:
            read = [
                _Place(("weight", weights.name(call, index)))
                if isinstance(operand, Static | Table)
                else places[alias.get(operand, operand)]
                for index, operand in enumerate(call.operands)
            ]
            for value, kind in zip(call.results, call.kernel.outputs, strict=True):
                if value in starts:
                    places[value] = _Place(_MEMORY, starts[value])
                elif value in plan.in_place:
                    places[value] = places[plan.in_place[value]]
                else:
                    places[value] = _Place(("made", value))
                    self.operands[places[value].operand] = kind.shape, storage_dtype(kind.dtype)
            self._calls.append([*read, *(places[value] for value in call.results)])
        self.results = [places[alias.get(value, value)].operand for _, value in graph.outputs]

    def prim_func(self, symbols: Sequence[str]) -> PrimFunc:
        """Write the function that calls kernels by their symbols; the virtual machine has checked its tensors."""
        with tensor_function(len(self.operands)) as (builder, pointers):
            memory = dict(zip(self.operands, pointers, strict=True))
            for symbol, places in zip(symbols, self._calls, strict=True):
                taken = [
                    tirx.handle_add_byte_offset(memory[_MEMORY], tirx.const(place.start, "int64"))
                    if place.operand == _MEMORY
                    else memory[place.operand]
                    for place in places
                ]
                call_internal(symbol, taken)
                T.evaluate(tirx.call_extern("int32", _OPAQUE))
        return builder.get()
