"""What every kernel generator has in common: the CPU it is built for, its operands, its knobs and its numpy meaning.

A kernel is a frozen dataclass derived from `Kernel`; its fields are the whole specification (shapes, epilogue, masks),
so two equal kernels are the same workload and `key` names that workload in the tuning database. `build` writes one TIR
function in destination-passing style: the operands of `inputs`, then those of `outputs`.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import numpy as np

from ir.types import TensorType

if TYPE_CHECKING:
    from codegen._tvm import PrimFunc

Knobs: TypeAlias = Mapping[str, int | str | bool]
Array: TypeAlias = np.ndarray


@dataclass(frozen=True)
class Isa:
    """What a kernel needs to know about the CPU.

    Attributes:
        name: `avx512`, `avx2`, `sse` or `neon`.
        lanes: Float32 lanes of a vector register: 16, 8 or 4.
        registers: Vector registers: 32 or 16.
        threads: Threads that share a parallel loop.
        bf16_dot: Whether one instruction adds the products of bfloat16 pairs.
        strassen: Whether large products may run as seven half ones, which rounds sums of rows: see
            `codegen.kernels.strassen`.
    """

    name: str
    lanes: int
    registers: int
    threads: int
    bf16_dot: bool = False
    strassen: bool = True


AVX512 = Isa("avx512", lanes=16, registers=32, threads=1)
AVX2 = Isa("avx2", lanes=8, registers=16, threads=1)
SSE = Isa("sse", lanes=4, registers=16, threads=1)
NEON = Isa("neon", lanes=4, registers=32, threads=1)


@dataclass(frozen=True)
class View:
    """Where an operand's heads lie inside a wider row-major buffer `[rows, width]`.

    Head `h`, element `d` is column `offset + h * size + d`, `size` being the operand's head size. So attention reads
    q, k and v straight out of one fused QKV product, without slices.

    Attributes:
        width: Columns of the buffer.
        offset: Column of the first element of head 0.
    """

    width: int
    offset: int = 0


def storage_dtype(dtype: str) -> str:
    """Return the numpy dtype that holds elements of a type: bfloat16, which numpy lacks, is stored as its bits."""
    return "uint16" if dtype == "bfloat16" else dtype


class Kernel(ABC):
    """A family member with static shapes; concrete kernels are frozen dataclasses.

    Attributes:
        family: First word of `key`; one word for each generator.
    """

    family: ClassVar[str]

    @property
    @abstractmethod
    def inputs(self) -> tuple[TensorType, ...]:
        """Logical input operands, weights unpacked."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[TensorType, ...]:
        """Operands that `build`'s function writes; they follow the inputs in its signature."""

    @abstractmethod
    def knobs(self, isa: Isa) -> Knobs:
        """Return the knobs that the rule picks without measuring (-O1)."""

    def knob_space(self, isa: Isa) -> list[Knobs]:
        """Return the alternatives worth measuring (-O3); the first is `knobs(isa)`."""
        return [self.knobs(isa)]

    @abstractmethod
    def build(self, isa: Isa, knobs: Knobs) -> PrimFunc:
        """Write the private TIR function, marked as scheduled and free of aliases."""

    def pack(self, index: int, array: Array, isa: Isa, knobs: Knobs) -> Array | None:
        """Bring the constant input `index` into the layout that `build` reads.

        Returns:
            The packed array, or None where the kernel reads the array as it is.
        """
        del index, array, isa, knobs
        return None

    def packed_shape(self, index: int, isa: Isa, knobs: Knobs) -> tuple[int, ...]:
        """Return the shape of input `index` as the built function takes it."""
        del isa, knobs
        return self.inputs[index].shape

    def packed_dtype(self, index: int) -> str:
        """Return the numpy dtype of input `index` as the built function takes it."""
        return storage_dtype(self.inputs[index].dtype)

    def packs(self, index: int) -> bool:
        """Tell whether input `index` wants `pack`, so must be a constant known at build time."""
        del index
        return False

    def rounds(self, index: int) -> bool:
        """Tell whether input `index` is rounded to bfloat16 before use, so may come as that with the same result."""
        del index
        return False

    def can_round(self, index: int) -> bool:
        """Tell whether output `index` can be stored as bfloat16."""
        del index
        return False

    def in_bfloat16(self, inputs: frozenset[int], outputs: frozenset[int]) -> Kernel:
        """Return this kernel with some inputs, which it `rounds`, and outputs, which it `can_round`, as bfloat16."""
        raise ValueError(f"{self.family} does not store bfloat16: inputs {set(inputs)}, outputs {set(outputs)}")

    @abstractmethod
    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        """Compute the outputs in float64 numpy from the logical (unpacked) inputs, literally.

        What is stored as bfloat16 comes as its bits, uint16; results are numbers, not rounded to their storage.
        """

    @property
    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations of one call; a multiply-add counts two, a transcendental one."""

    @property
    def bytes_moved(self) -> int:
        """Bytes of all operands, each read or written once."""
        return sum(operand.size_bytes for operand in (*self.inputs, *self.outputs))

    @property
    def writes_over(self) -> int | None:
        """Number of the input whose memory is the output's too; what is not written stays as it was."""
        return None

    @property
    def is_generic(self) -> bool:
        """Whether no schedule was written for this work: positions are computed anew for every vector."""
        return False

    @property
    def key(self) -> str:
        """Return the stable text of the workload, e.g. `gemm(m=128,n=768,k=768,bias,activation=gelu)`."""
        return f"{self.family}({','.join(_field_text(self))})"

    @property
    def symbol(self) -> str:
        """Return `key` as a legal function name."""
        return re.sub(r"\W+", "_", self.key).strip("_")


def _field_text(kernel: Kernel) -> list[str]:
    """List the fields that differ from their default; a true flag is its bare name."""
    parts: list[str] = []
    for field in dataclasses.fields(kernel):  # pyright: ignore[reportArgumentType]  # every concrete kernel is a dataclass
        value = getattr(kernel, field.name)
        if value == field.default:
            continue
        if value is True:
            parts.append(field.name)
        elif isinstance(value, View):
            parts.append(f"{field.name}={value.width}+{value.offset}")
        elif isinstance(value, tuple):
            parts.append(f"{field.name}={'/'.join(f'{item:.9g}' for item in value)}")
        elif isinstance(value, float):
            parts.append(f"{field.name}={value:.9g}")
        else:
            parts.append(f"{field.name}={value}")
    return parts
