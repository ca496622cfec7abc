"""What an operation is: one class with its attributes, shape rule, cost and numpy meaning.

    @op
    class Softmax(Op):
        axis: int = -1

        def infer(self, x: TensorType) -> TensorType: ...
        def evaluate(self, x: Array) -> Array: ...
        def flops(self, operands: Types, results: Types) -> int: ...

The fields of the class are its attributes; the printed name is the class name in snake_case. The set of operations
is closed: backends keep one table `dict[type[Op], ...]` each, and a test prints the rows that are missing.
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, TypeVar

import numpy.typing as npt

from ir._typing import dataclass_transform
from ir.errors import GraphError, did_you_mean
from ir.types import TensorType

Array = npt.NDArray[Any]
Types = tuple[TensorType, ...]


@dataclass(frozen=True)
class Op(ABC):
    """An operation with its attributes; operands and results are held by the node, not here.

    Class attributes:
        name: Printed name, snake_case of the class.
        commutative: Whether operands may be reordered without changing the result.
        hints: Attributes that choose between equal ways to compute (never part of the canonical hash).
        later: Attributes that the first release lacked; left out of hashes and files where they have their default, so
            that both stay as they were.
    """

    name: ClassVar[str] = ""
    commutative: ClassVar[bool] = False
    hints: ClassVar[frozenset[str]] = frozenset()
    later: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def infer(self, *operands: Any, **_: Any) -> TensorType | Types:
        """Result type(s) from operand types.

        Raises:
            GraphError: The operands do not fit.
        """

    @abstractmethod
    def evaluate(self, *operands: Any, **_: Any) -> Array | tuple[Array, ...]:
        """Result(s) in numpy, at the precision of the operands: the meaning of the operation."""

    def flops(self, operands: Types, results: Types) -> int:
        """Floating-point operations; a multiply-add counts two. Default: none (moves data only)."""
        return 0

    def macs(self, operands: Types, results: Types) -> int:
        """Multiply-adds, of operations that are products in the main; none for others."""
        return 0

    def bytes_moved(self, operands: Types, results: Types) -> int:
        """Bytes read and written if nothing stays in cache. Default: all operands and results once."""
        return sum(t.size_bytes for t in operands) + sum(t.size_bytes for t in results)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attribute values by name, in declaration order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def infer_types(self, operands: Types) -> Types:
        """Result types as a tuple, whatever `infer` returns."""
        try:
            results = self.infer(*operands)
        except TypeError as error:
            if "positional argument" not in str(error):
                raise
            raise GraphError(f"{self.name}: wrong number of operands", found=f"{len(operands)} operands") from error
        return results if isinstance(results, tuple) else (results,)

    def evaluate_all(self, operands: tuple[Array, ...]) -> tuple[Array, ...]:
        """Results as a tuple, whatever `evaluate` returns."""
        results = self.evaluate(*operands)
        return results if isinstance(results, tuple) else (results,)


OPS: Final[dict[str, type[Op]]] = {}
"""Every operation by its printed name; complete once `ir.ops` is imported."""

OpClass = TypeVar("OpClass", bound=type[Op])


def snake_case(name: str) -> str:
    """`GatedLinearAttention` -> `gated_linear_attention`, `Conv` -> `conv`, `GLU` -> `glu`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@dataclass_transform(frozen_default=True)
def op(cls: OpClass) -> OpClass:
    """Make a class an operation: a frozen dataclass, registered under its snake_case name."""
    cls.name = snake_case(cls.__name__)
    made: OpClass = dataclass(frozen=True)(cls)
    if cls.name in OPS:
        raise GraphError(f"operation {cls.name} is defined twice")
    OPS[cls.name] = made
    return made


def op_class(name: str) -> type[Op]:
    """The operation class of a printed name.

    Raises:
        GraphError: No such operation.
    """
    importlib.import_module("ir.ops")
    if name not in OPS:
        raise GraphError(f"unknown operation '{name}'", hint=did_you_mean(name, OPS))
    return OPS[name]


def require(condition: bool, message: str, *, expected: str | None = None, found: object = None) -> None:
    """Raise a GraphError unless a shape rule holds.

    Raises:
        GraphError: The condition is false.
    """
    if not condition:
        raise GraphError(message, expected=expected, found=None if found is None else str(found))


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of numpy broadcasting.

    Raises:
        GraphError: The shapes do not broadcast.
    """
    rank = max(map(len, shapes), default=0)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    sizes = [{size for size in column if size != 1} or {1} for column in zip(*padded, strict=True)]
    if any(len(column) > 1 for column in sizes):
        raise GraphError("shapes do not broadcast", found=" and ".join(map(str, shapes)))
    return tuple(column.pop() for column in sizes)


def normal_axis(axis: int, rank: int) -> int:
    """Axis counted from the front.

    Raises:
        GraphError: The axis is out of range.
    """
    require(-rank <= axis < rank, "axis out of range", expected=f"-{rank} to {rank - 1}", found=axis)
    return axis % rank
