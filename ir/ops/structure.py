"""Inputs, parameters, constants and component calls: nodes that hold a graph together.

Shape letters: none; these take any shape.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from ir.errors import GraphError
from ir.op import Array, Op, Types, op, require
from ir.types import Axes, TensorType, axes_shape

NUMPY_DTYPES: Final = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.float32,
    "int32": np.int32,
    "bool": np.bool_,
}
"""Storage of each dtype in numpy, which has no bfloat16: such values are held as float32."""

ComponentOptions = tuple[tuple[str, "OptionValue"], ...]
OptionValue = None | bool | int | float | str | tuple["OptionValue", ...]


@op
class Input(Op):
    """A value given at call time."""

    label: str
    type: TensorType

    def infer(self) -> TensorType:
        return self.type

    def evaluate(self) -> Array:
        raise GraphError("an input has no value of its own", where=self.label)

    def bytes_moved(self, operands: Types, results: Types) -> int:
        return 0  # counted where it is read


@op
class Parameter(Op):
    """A tensor that belongs to the model; each dimension is a product of named axes.

    `init` names an initial distribution of `ir.initializers`, such as `normal(0.02)` or `fan_in`. What is not `trained`
    no gradient changes: running statistics of batch norm, routers that stay random.
    """

    later: ClassVar[frozenset[str]] = frozenset({"trained"})

    label: str
    axes: Axes
    init: str = "fan_in"
    trained: bool = True

    def infer(self) -> TensorType:
        return TensorType(axes_shape(self.axes), "float32")

    def evaluate(self) -> Array:
        raise GraphError("a parameter has no value of its own", where=self.label)

    def bytes_moved(self, operands: Types, results: Types) -> int:
        return 0  # counted where it is read


@op
class Constant(Op):
    """A tensor known when the graph is built, held as little-endian bytes in row-major order."""

    type: TensorType
    data: bytes

    def infer(self) -> TensorType:
        itemsize = np.dtype(NUMPY_DTYPES[self.type.dtype]).itemsize
        require(
            len(self.data) == self.type.size * itemsize,
            "constant data does not fill its type",
            expected=f"{self.type.size * itemsize} bytes for {self.type}",
            found=f"{len(self.data)} bytes",
        )
        return self.type

    def evaluate(self) -> Array:
        return np.reshape(np.frombuffer(self.data, NUMPY_DTYPES[self.type.dtype]), self.type.shape)

    def bytes_moved(self, operands: Types, results: Types) -> int:
        return 0  # counted where it is read

    @staticmethod
    def from_array(array: Array) -> Constant:
        """A constant of an array's values; float64 is stored as float32, int64 as int32."""
        dtype = {"f": "float32", "i": "int32", "b": "bool"}[array.dtype.kind]
        stored = np.ascontiguousarray(array, dtype=NUMPY_DTYPES[dtype])
        return Constant(TensorType(tuple(int(size) for size in array.shape), dtype), stored.tobytes())


@op
class Component(Op):
    """A whole component as one node, until `expand_components` puts its body in place.

    The first operand is the value it transforms; the result types are stated by whoever builds the call.
    """

    kind: str
    key: str
    options: ComponentOptions
    types: tuple[TensorType, ...]

    def infer(self, *operands: TensorType) -> Types:
        return self.types

    def evaluate(self, *operands: Array) -> Array:
        raise GraphError("expand components before evaluating a graph", where=f"{self.kind}.{self.key}")
