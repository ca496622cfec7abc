"""What the rows write with: nodes and constants of one ONNX graph, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ir.op import Array, Op
from ir.types import TensorType

OPSET: Final = 18
"""Operator set of every model: the first with all that is needed here, so that older runtimes read it too."""
ELEMENTS: Final = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "float64": TensorProto.DOUBLE,
    "bool": TensorProto.BOOL,
}


@dataclass(frozen=True)
class Site:
    """Where a row is applied.

    Attributes:
        op: The operation with its attributes.
        types: Types of its operands.
        results: Types of its results.
    """

    op: Any
    types: tuple[TensorType, ...]
    results: tuple[TensorType, ...]

    @property
    def dtype(self) -> str:
        """Element type of the first result."""
        return self.results[0].dtype


Typed = tuple[str, TensorType]
"""A value's name and type."""
Row = Callable[..., "str | tuple[str, ...]"]
"""`row(emitter, site, *operands)`: writes nodes and returns the name of each result."""
Table = Mapping[type[Op], Row]


class Emitter:
    """A growing ONNX graph.

    Attributes:
        rows: The row of each operation.
        where: Path of the node that is being written; new names start with it.
    """

    def __init__(self, rows: Table | None = None, *, shared: Emitter | None = None) -> None:
        self.rows: Table = shared.rows if shared else rows or {}
        self.where = shared.where if shared else ""
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = shared.initializers if shared else []
        self._taken: set[str] = shared._taken if shared else set()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = shared._constants if shared else {}

    def reserve(self, names: Iterable[str]) -> None:
        """Keep names from being made up."""
        self._taken.update(names)

    def fresh(self, hint: str) -> str:
        """Return a name that nothing has."""
        base = f"{self.where}/{hint}" if self.where else hint
        name, count = base, 1
        while name in self._taken:
            name, count = f"{base}_{count}", count + 1
        self._taken.add(name)
        return name

    def many(self, count: int, kind: str, *operands: str, **attributes: Any) -> tuple[str, ...]:
        """Add a node with several results and return their names."""
        results = tuple(self.fresh(kind) for _ in range(count))
        self.nodes.append(helper.make_node(kind, list(operands), list(results), name=results[0], **attributes))
        return results

    def __call__(self, kind: str, *operands: str, **attributes: Any) -> str:
        """Add a node with one result and return its name."""
        return self.many(1, kind, *operands, **attributes)[0]

    def rename(self, value: str, name: str) -> None:
        """Give a value a second name that is known from outside."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=self.fresh("Identity")))

    def constant(self, array: Array) -> str:
        """Return the name of a constant; equal ones are held once. float64 and int64 stay what they are."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh("constant")
            self.initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def parameter(self, name: str, array: Array) -> str:
        """Add an initializer under a parameter's own name."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array, dtype=np.float32), name))
        return name

    def floats(self, values: Any, dtype: str = "float32") -> str:
        """Return a floating-point constant, or a scalar, of an element type."""
        name = self.constant(np.asarray(values, np.float32))
        return name if dtype == "float32" else self("Cast", name, to=ELEMENTS[dtype])

    def ints(self, *values: int) -> str:
        """Return a vector of int64, as axes and shapes are given."""
        return self.constant(np.asarray(values, np.int64))

    def cast(self, value: str, dtype: str) -> str:
        """Convert to an element type of `ELEMENTS`."""
        return self("Cast", value, to=ELEMENTS[dtype])

    def reshape(self, value: str, shape: Sequence[int]) -> str:
        """Same elements in another shape."""
        return self("Reshape", value, self.ints(*shape))

    def transpose(self, value: str, *permutation: int) -> str:
        """Axes in another order."""
        return self("Transpose", value, perm=list(permutation))

    def expand(self, value: str, shape: Sequence[int]) -> str:
        """Repeat along axes of size 1 and new leading axes."""
        return self("Expand", value, self.ints(*shape))

    def rounded(self, value: str, dtype: str = "float32") -> str:
        """Round to bfloat16 and back."""
        return self.cast(self.cast(value, "bfloat16"), dtype)

    def body(self, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]) -> GraphProto:
        """Return what was written as the body of a loop."""
        return GraphProto(name=self.fresh("body"), node=self.nodes, input=inputs, output=outputs)


def value_info(name: str, kind: TensorType) -> ValueInfoProto:
    """Name, element type and shape, as ONNX states them."""
    return helper.make_tensor_value_info(name, ELEMENTS[kind.dtype], kind.shape)
