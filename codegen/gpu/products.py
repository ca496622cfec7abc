"""Products: dense with epilogues, in batches, and convolutions as products of gathered rows.

A work-group computes a tile of rows times columns. For every step of some reduced elements it brings a slice of both
operands to shared memory; each thread keeps a small tile of sums in registers. A few rows only (decoding) are served by
columns side by side instead, the reduced length shared out to the threads of a work-group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from codegen._tvm import Buffer, Expr, PrimFunc
from codegen.gpu.emit import (
    Index,
    Operand,
    add_to,
    barrier,
    bind,
    both,
    branch,
    build_function,
    guarded,
    launch,
    number,
    private,
    put,
    round_bfloat16,
    serial,
    shared,
    strided,
    unrolled,
)
from codegen.gpu.tail import apply_tail, taps_place
from codegen.kernels.base import Knobs
from codegen.kernels.batch_gemm import BatchGemmKernel
from codegen.kernels.conv import ConvKernel
from codegen.kernels.gemm import GemmKernel
from codegen.kernels.vector_math import ACTIVATIONS
from codegen.targets.base import Gpu

FEW_ROWS: Final = 4
"""Rows up to which a tile of them would be mostly empty."""
COLUMNS: Final = 32
"""Columns of a work-group that serves a few rows."""

Load = Callable[[Expr, Index, Index], Expr]
"""`load(batch, row or k, k or column)`: an element of an operand, in range."""
Finish = Callable[[Expr, Index, Index, Sequence[Expr]], None]
"""`finish(batch, row, column, sums)`: what becomes of the sums of an element."""


@dataclass(frozen=True)
class Product:
    """A batch of products.

    Attributes:
        batch: Products.
        m: Rows.
        n: Columns.
        k: Reduced length.
        left: Elements of the left operand, by batch, row and k.
        right: Elements of the right operands, by batch, k and column; one product for each.
        finish: What becomes of the sums.
        rounded: Whether operands are rounded to bfloat16.
    """

    batch: int
    m: int
    n: int
    k: int
    left: Load
    right: Sequence[Load]
    finish: Finish
    rounded: bool = False


def product_knobs(batch: int, m: int, n: int, k: int, parts: int, gpu: Gpu) -> Knobs:
    """Choose the largest tile that leaves enough work-groups, for 16 x 16 threads; see the top.

    Args:
        batch: Products.
        m: Rows of each.
        n: Columns of each.
        k: Reduced length.
        parts: Right operands, each with sums of its own.
        gpu: The device.
    """
    if m <= FEW_ROWS:
        shares = 8
        while shares * 2 * COLUMNS <= min(gpu.max_threads, 256) and shares * 64 < k:
            shares *= 2
        return {"path": "columns", "shares": shares}
    rows, columns = (64 if m > 32 else 32 if m > 16 else 16), (64 if n > 32 and parts == 1 else 32 if n > 16 else 16)
    while rows * columns > 1024 and batch * -(-m // rows) * -(-n // columns) < 32:
        if rows >= columns:
            rows //= 2
        else:
            columns //= 2
    return {"path": "tiles", "rows": rows, "columns": columns, "depth": 16, "tall": rows // 16, "wide": columns // 16}


def write_product(product: Product, knobs: Knobs) -> None:
    """Write one launch."""
    if knobs["path"] == "columns":
        _Columns(product, int(knobs["shares"])).write()
    else:
        _Tiles(product, knobs).write()


class _Tiles:
    """Writes the tiled form."""

    def __init__(self, product: Product, knobs: Knobs) -> None:
        self.product = product
        self.rows, self.columns, self.depth = (int(knobs[name]) for name in ("rows", "columns", "depth"))
        self.tall, self.wide = int(knobs["tall"]), int(knobs["wide"])
        self.across, self.down = self.columns // self.wide, self.rows // self.tall

    def write(self) -> None:
        """Write the loop over the reduced length."""
        product, parts = self.product, len(self.product.right)
        column_tiles, row_tiles = -(-product.n // self.columns), -(-product.m // self.rows)
        with launch(product.batch * row_tiles * column_tiles, self.across * self.down) as (group, thread):
            self.thread = thread
            self.first_column = bind(group % column_tiles * self.columns)
            self.first_row = bind(group // column_tiles % row_tiles * self.rows)
            self.batch = bind(group // (column_tiles * row_tiles))
            left = shared(self.depth * (self.rows + 1))
            rights = [shared(self.depth * self.columns) for _ in range(parts)]
            sums = private(parts * self.tall * self.wide, 0.0)
            with serial(0, -(-product.k // self.depth)) as step:
                first = bind(step * self.depth)
                self._bring(first, left, rights)
                barrier()
                self._multiply(left, rights, sums)
                barrier()
            self._finish(sums)

    def _bring(self, first: Expr, left: Buffer, rights: Sequence[Buffer]) -> None:
        """Bring a slice of the operands to shared memory; what lies beyond them is zero."""
        product, depth = self.product, self.depth
        threads = self.across * self.down
        deep = product.k % depth == 0
        with strided(self.thread, threads, depth * self.rows) as place:
            k, row = bind(place % depth), bind(place // depth)
            inside = both(
                True if deep else first + k < product.k,
                True if product.m % self.rows == 0 else self.first_row + row < product.m,
            )
            value = guarded(inside, lambda: product.left(self.batch, self.first_row + row, first + k))
            put(left, round_bfloat16(value) if product.rounded else value, k * (self.rows + 1) + row)
        with strided(self.thread, threads, depth * self.columns) as place:
            column, k = bind(place % self.columns), bind(place // self.columns)
            inside = both(
                True if deep else first + k < product.k,
                True if product.n % self.columns == 0 else self.first_column + column < product.n,
            )
            for right, load in zip(rights, product.right, strict=True):
                value = guarded(inside, lambda load=load: load(self.batch, first + k, self.first_column + column))
                put(right, round_bfloat16(value) if product.rounded else value, k * self.columns + column)

    def _multiply(self, left: Buffer, rights: Sequence[Buffer], sums: Buffer) -> None:
        """Add the products of the slice; a thread has every `across`-th column and every `down`-th row."""
        x, y = self.thread % self.across, self.thread // self.across
        with serial(0, self.depth) as k:
            column = private(self.tall)
            with unrolled(self.tall) as i:
                put(column, left[k * (self.rows + 1) + y + i * self.down], i)
            for part, right in enumerate(rights):
                with unrolled(self.wide) as j:
                    element = private(1)
                    put(element, right[k * self.columns + x + j * self.across], 0)
                    with unrolled(self.tall) as i:
                        add_to(sums, column[i] * element[0], (part * self.wide + j) * self.tall + i)

    def _finish(self, sums: Buffer) -> None:
        product = self.product
        x, y = self.thread % self.across, self.thread // self.across
        with unrolled(self.wide) as j, unrolled(self.tall) as i:
            row, column = self.first_row + y + i * self.down, self.first_column + x + j * self.across
            inside = both(
                True if product.m % self.rows == 0 else row < product.m,
                True if product.n % self.columns == 0 else column < product.n,
            )
            found = [sums[(part * self.wide + j) * self.tall + i] for part in range(len(product.right))]
            if inside is True:
                product.finish(self.batch, row, column, found)
            else:
                with branch(inside):
                    product.finish(self.batch, row, column, found)


class _Columns:
    """Writes the form for a few rows."""

    def __init__(self, product: Product, shares: int) -> None:
        self.product, self.shares = product, shares

    def write(self) -> None:
        """Let each thread sum its share of the reduced length, then add the shares up."""
        product, shares, parts = self.product, self.shares, len(self.product.right)
        column_groups = -(-product.n // COLUMNS)
        count = parts * product.m
        with launch(product.batch * column_groups, COLUMNS * shares) as (group, thread):
            lane, share = bind(thread % COLUMNS), bind(thread // COLUMNS)
            column = bind(group % column_groups * COLUMNS + lane)
            batch = bind(group // column_groups)
            area, sums = shared(count * COLUMNS * shares), private(count, 0.0)
            exists = True if product.n % COLUMNS == 0 else column < product.n
            with serial(0, -(-product.k // shares)) as step:
                k = bind(step * shares + share)
                with branch(_certain(both(exists, True if product.k % shares == 0 else k < product.k))):
                    self._add(sums, batch, k, column)
            with unrolled(count) as part:
                put(area, sums[part], (part * shares + share) * COLUMNS + lane)
            barrier()
            with branch(_certain(both(exists, share < 1))):
                with serial(1, shares) as other, unrolled(count) as part:
                    add_to(sums, area[(part * shares + other) * COLUMNS + lane], part)
                for row in range(product.m):
                    product.finish(batch, row, column, [sums[part * product.m + row] for part in range(parts)])

    def _add(self, sums: Buffer, batch: Expr, k: Expr, column: Expr) -> None:
        product = self.product
        for part, load in enumerate(product.right):
            right = private(1)
            value = load(batch, k, column)
            put(right, round_bfloat16(value) if product.rounded else value, 0)
            for row in range(product.m):
                left = product.left(batch, row, k)
                add_to(sums, (round_bfloat16(left) if product.rounded else left) * right[0], part * product.m + row)


def _certain(condition: Expr | bool) -> Expr:
    return number(1, "bool") if isinstance(condition, bool) else condition


def gemm_knobs(kernel: GemmKernel, gpu: Gpu) -> Knobs:
    """Choose a tile; a gated product keeps two sums for each element."""
    return product_knobs(1, kernel.m, kernel.n, kernel.k, 2 if kernel.gate else 1, gpu)


def write_gemm(kernel: GemmKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write a dense product with its epilogue."""
    del gpu
    stride = 2 * kernel.n if kernel.gate else kernel.n
    width, offset = (kernel.a_view.width, kernel.a_view.offset) if kernel.a_view else (kernel.k, 0)

    def write(a: Operand, w: Operand, *rest: Operand) -> None:
        pending = list(rest)
        bias = pending.pop(0) if kernel.bias else None
        residual = pending.pop(0) if kernel.residual else None
        out = pending.pop(0)

        def right(first: int) -> Load:
            return lambda _, k, column: w[k * stride + first + column]

        def finish(_: Expr, row: Index, column: Index, sums: Sequence[Expr]) -> None:
            values = [value if kernel.scale == 1.0 else value * number(kernel.scale) for value in sums]
            if bias is not None:
                values = [value + bias[part * kernel.n + column] for part, value in enumerate(values)]
            value = values[0]
            if kernel.activation:
                value = ACTIVATIONS[kernel.activation](value)
            if kernel.gate:
                value = ACTIVATIONS[kernel.gate](values[1]) * value
            place = row * kernel.n + column
            out.put(value if residual is None else value + residual[place], place)

        product = Product(
            batch=1,
            m=kernel.m,
            n=kernel.n,
            k=kernel.k,
            left=lambda _, row, k: a[row * width + offset + k],
            right=[right(0), right(kernel.n)] if kernel.gate else [right(0)],
            finish=finish,
            rounded=kernel.precision == "bfloat16",
        )
        write_product(product, knobs)

    return build_function(kernel, write)


def batch_gemm_knobs(kernel: BatchGemmKernel, gpu: Gpu) -> Knobs:
    """Choose a tile."""
    return product_knobs(kernel.batch, kernel.m, kernel.n, kernel.k, 1, gpu)


def write_batch_gemm(kernel: BatchGemmKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write products of run-time operands."""
    del gpu
    m, n, k_size = kernel.m, kernel.n, kernel.k

    def write(a: Operand, b: Operand, out: Operand) -> None:
        def left(batch: Expr, row: Index, k: Index) -> Expr:
            base = 0 if kernel.a_shared else batch * (m * k_size)
            return a[base + (k * m + row if kernel.transpose_a else row * k_size + k)]

        def right(batch: Expr, k: Index, column: Index) -> Expr:
            base = 0 if kernel.b_shared else batch * (n * k_size)
            return b[base + (column * k_size + k if kernel.transpose_b else k * n + column)]

        def finish(batch: Expr, row: Index, column: Index, sums: Sequence[Expr]) -> None:
            value = sums[0] if kernel.scale == 1.0 else sums[0] * number(kernel.scale)
            out.put(value, (batch * m + row) * n + column)

        rounded = kernel.precision == "bfloat16"
        write_product(Product(kernel.batch, m, n, k_size, left, [right], finish, rounded), knobs)

    return build_function(kernel, write)


def conv_knobs(kernel: ConvKernel, gpu: Gpu) -> Knobs:
    """Choose a tile of pixels and channels; a group is a product of its own."""
    length = kernel.weight.size // kernel.weight.shape[-1]
    return product_knobs(kernel.op.groups, kernel.rows, kernel.group_outputs, length, 1, gpu)


def write_conv(kernel: ConvKernel, gpu: Gpu, knobs: Knobs) -> PrimFunc:
    """Write a convolution as a product: rows are pixels, the reduced length runs over taps and input channels."""
    del gpu
    taps, channels = kernel.taps, kernel.x.shape[-1]
    depth, outputs = kernel.weight.shape[-2], kernel.weight.shape[-1]

    def write(x: Operand, w: Operand, *rest: Operand) -> None:
        *operands, out = rest

        def left(group: Expr, row: Index, k: Index) -> Expr:
            inside, pixel = taps_place(taps, row, k // depth if depth > 1 else k)
            channel = group * depth + k % depth if depth > 1 else group
            return guarded(inside, lambda: x[pixel * channels + channel])

        def right(group: Expr, k: Index, column: Index) -> Expr:
            return w[k * outputs + group * kernel.group_outputs + column]

        def finish(group: Expr, row: Index, column: Index, sums: Sequence[Expr]) -> None:
            channel = group * kernel.group_outputs + column
            value = apply_tail(kernel.tail, sums[0], operands, row, channel, kernel.rows, outputs)
            out.put(value, row * outputs + channel)

        length = kernel.weight.size // outputs
        write_product(
            Product(kernel.op.groups, kernel.rows, kernel.group_outputs, length, left, [right], finish), knobs
        )

    return build_function(kernel, write)
