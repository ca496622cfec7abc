"""The C signatures of a model's functions: names, element types, and the state that `step` carries."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from codegen.container import TensorSpec
from codegen.inputs import index_bounds
from codegen.kernels.base import storage_dtype
from codegen.memory import aligned
from ir.cost import STATE_PREFIX
from ir.errors import CompileError
from ir.graph import Graph

POSITION: Final = "position"
STEP: Final = "step"

C_TYPES: Final[Mapping[str, str]] = {
    "float64": "double",
    "float32": "float",
    "float16": "uint16_t",
    "uint16": "uint16_t",
    "int64": "int64_t",
    "int32": "int32_t",
    "int16": "int16_t",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "bool": "uint8_t",
}
"""C type of each numpy type; half precision is passed as its bits."""

_TAKEN: Final = """
auto break case char class const continue default delete do double else enum extern float for goto if inline int long
new operator private public register restrict return short signed sizeof static struct switch template this throw
typedef union unsigned virtual void volatile while
memory workspace state before after kept in_range memcpy memset
"""
"""Keywords of C and C++, and names inside model.c."""


@dataclass(frozen=True)
class Argument:
    """One argument of a C function.

    Attributes:
        spec: Name, shape, element type and bound in the graph.
        name: Name in C.
    """

    spec: TensorSpec
    name: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.spec.shape, dtype=np.int64))

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return self.elements * np.dtype(self.spec.dtype).itemsize

    @property
    def c_type(self) -> str:
        """C type of an element."""
        return C_TYPES[self.spec.dtype]


@dataclass(frozen=True)
class Signature:
    """A function as its caller sees it.

    Attributes:
        name: `forward` or `step`.
        inputs: For each input of the graph its argument; None for what the state holds.
        outputs: The same of each output.
        input_names: Names of the graph's inputs in order.
        output_names: Names of the graph's outputs in order.
        bank: Parts of the state that a step replaces, by their names in the graph, with the byte of a bank at which
            each begins.
        bank_bytes: Bytes of a bank, of which a state has two.
        kept: Parts of the state that a step extends where they lie, likewise.
        kept_bytes: Bytes of these.
        most_steps: Steps after which the state is full; None where it never is.
    """

    name: str
    inputs: tuple[Argument | None, ...]
    outputs: tuple[Argument | None, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    bank: Mapping[str, int]
    bank_bytes: int
    kept: Mapping[str, int]
    kept_bytes: int
    most_steps: int | None

    @property
    def has_state(self) -> bool:
        """Whether something is carried from call to call."""
        return self.name == STEP

    @property
    def state(self) -> list[str]:
        """Names of the parts of the state."""
        return [*self.bank, *self.kept]

    @property
    def state_bytes(self) -> int:
        """Bytes that a stream leaves to its next step."""
        return self.bank_bytes + self.kept_bytes

    @property
    def arguments_in(self) -> list[Argument]:
        """Arguments that are read."""
        return [argument for argument in self.inputs if argument is not None]

    @property
    def arguments_out(self) -> list[Argument]:
        """Arguments that are written."""
        return [argument for argument in self.outputs if argument is not None]


def signature_of(name: str, graph: Graph, kept: Collection[str] = ()) -> Signature:
    """Return the signature of a graph.

    Args:
        name: `forward` or `step`.
        graph: What the function computes.
        kept: Parts of the state that it extends where they lie.

    Raises:
        CompileError: A state goes in and does not come out as it went in, or an element type has no C type.
    """
    bounds = index_bounds(graph)
    state = _state(name, graph)
    taken: set[str] = set()
    inputs: list[Argument | None] = []
    for key, node in graph.inputs.items():
        held = name == STEP and (key in state or key == POSITION)
        spec = TensorSpec(key, node.types[0].shape, storage_dtype(node.types[0].dtype), below=bounds.get(key))
        inputs.append(None if held else _argument(spec, taken))
    outputs: list[Argument | None] = []
    for key, value in graph.outputs:
        kind = graph.type_of(value)
        spec = TensorSpec(key, kind.shape, storage_dtype(kind.dtype))
        outputs.append(None if key in state else _argument(spec, taken))
    bank, bank_bytes = _lay_out({key: size for key, size in state.items() if key not in kept})
    caches, kept_bytes = _lay_out({key: size for key, size in state.items() if key in kept})
    return Signature(
        name=name,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        input_names=tuple(graph.inputs),
        output_names=tuple(key for key, _ in graph.outputs),
        bank=bank,
        bank_bytes=bank_bytes,
        kept=caches,
        kept_bytes=kept_bytes,
        most_steps=bounds.get(POSITION) if name == STEP else None,
    )


def identifier(text: str) -> str:
    """Return a text as a C identifier."""
    word = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "model"
    return f"_{word}" if word[0].isdigit() or word in _TAKEN.split() else word


def _argument(spec: TensorSpec, taken: set[str]) -> Argument:
    if spec.dtype not in C_TYPES:
        raise CompileError(
            "no C type holds these elements", where=spec.name, expected=", ".join(C_TYPES), found=spec.dtype
        )
    name = identifier(spec.name)
    while name in taken:
        name = f"{name}_out"
    taken.add(name)
    return Argument(spec, name)


def _state(name: str, graph: Graph) -> dict[str, int]:
    """Return the bytes of each part of the state: the inputs named `state.*` of a step, which are outputs too."""
    sizes: dict[str, int] = {}
    made = dict(graph.outputs)
    for key, node in graph.inputs.items() if name == STEP else ():
        if not key.startswith(STATE_PREFIX):
            continue
        kind = node.types[0]
        if key not in made or graph.type_of(made[key]) != kind:
            raise CompileError("a step does not return its state", where=key, expected=f"an output {kind}")
        sizes[key] = kind.size * np.dtype(storage_dtype(kind.dtype)).itemsize
    return sizes


def _lay_out(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Return where each part begins when one lies behind the other, and where they end."""
    starts: dict[str, int] = {}
    end = 0
    for key, size_bytes in sizes.items():
        starts[key] = end
        end += aligned(size_bytes)
    return starts, end
