"""Convolutions as matrix products."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ir.graph import Graph, Node, Value
from ir.ops.contraction import Matmul
from ir.ops.convolution import Conv
from ir.ops.shape import Reshape, Slice, Transpose
from ir.passes.base import Pass
from ir.rewrite import Replacement, Rewriter, rewrite


@dataclass(frozen=True)
class LowerConvolutions(Pass):
    """Write convolutions whose windows tile the input, patches or single pixels, as products of patches and weights.

    conv x w {strides=[4, 4]}  ->  matmul (reshape (transpose (reshape x))) (reshape w)
    """

    def run(self, graph: Graph) -> Graph:
        """The graph without the convolutions that this covers."""
        return rewrite(graph, {Conv: [_as_product]})


def _as_product(r: Rewriter, node: Node) -> Replacement:
    op = node.op
    assert isinstance(op, Conv)
    x, weight = node.operands
    window, channels = r.type_of(weight).shape[:-2], r.type_of(x).shape[-1]
    tiles = op.strides == window and not any(itertools.chain(*op.padding)) and max(op.dilation) == 1
    if op.groups != 1 or not tiles:
        return None
    patches = _tiles(r, x, window, node.types[0].shape)
    rows = r.emit(Reshape((*node.types[0].shape[:-1], math.prod(window) * channels)), patches)
    matrix = r.emit(Reshape((math.prod(window) * channels, node.types[0].shape[-1])), weight)
    return r.emit(Matmul(), rows, matrix)


def _tiles(r: Rewriter, x: Value, window: tuple[int, ...], result: tuple[int, ...]) -> Value:
    """Windows side by side: `[B, S, C] -> [B, S / W, W, C]`, each spatial axis alike."""
    batch, *sizes, channels = r.type_of(x).shape
    counts, axes = result[1:-1], len(window)
    for axis, (size, count, width) in enumerate(zip(sizes, counts, window, strict=True), start=1):
        if size != count * width:
            x = r.emit(Slice(axis, 0, count * width), x)
    split = tuple(itertools.chain(*zip(counts, window, strict=True)))
    x = r.emit(Reshape((batch, *split, channels)), x)
    order = (0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return r.emit(Transpose(order), x)
