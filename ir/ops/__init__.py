"""The closed set of operations, a file for each family."""

from ir.ops import (
    attention,
    contraction,
    control,
    convolution,
    elementwise,
    indexing,
    normalization,
    recurrence,
    reduction,
    shape,
    sorting,
    spectral,
    structure,
)

__all__ = [
    "attention",
    "contraction",
    "control",
    "convolution",
    "elementwise",
    "indexing",
    "normalization",
    "recurrence",
    "reduction",
    "shape",
    "sorting",
    "spectral",
    "structure",
]
