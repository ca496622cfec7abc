"""Fast Fourier transforms as TIR: passes of small radices in the order of Stockham, which needs no bit reversal.

A point is a complex number for each lane: one vector of real parts, one of imaginary parts. All twiddle factors come
from one table of the roots of unity. The inverse is the same transform with the parts exchanged going in and out.

Source: the autosort form as in Van Loan 1992, "Computational Frameworks for the Fast Fourier Transform", section 1.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from codegen._tvm import Buffer, Expr
from codegen.kernels.base import Array
from codegen.kernels.emit import Index, Vectors, bind, scratch, serial
from codegen.kernels.vector_math import lanes_of, splat

Complex = tuple[Expr, Expr]
Read = Callable[[Index, int, int], Complex | None]
"""`read(place, first, last)`: the point at a place that lies in `first..last`; None if all of these are zero."""
Write = Callable[[Index, int, int, Complex], None]
"""`write(place, first, last, value)`: store the point at a place that lies in `first..last`."""

UNROLLED_PRIMES: Final = (3, 5, 7)
PAIRS_AT_ONCE: Final = 2  # of outputs of a larger prime: eight sums, so that none waits for another


def roots(length: int) -> Array:
    """Return exp(-2 pi i j / length) as `[length, 2]` float32, computed in float64."""
    angle = -2 * math.pi * np.arange(length) / length
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def smooth_length(least: int) -> int:
    """Return the shortest length from `least` on that is made of the factors 2, 3 and 5."""
    length = least
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 1


def radices(length: int, largest: int) -> list[int]:
    """Split a length into the radices of the passes: powers of two up to `largest` first, then odd primes."""
    found: list[int] = []
    for radix in (8, 4, 2):
        while radix <= largest and length % radix == 0:
            found.append(radix)
            length //= radix
    prime = 3
    while length > 1:
        while length % prime == 0:
            found.append(prime)
            length //= prime
        prime += 2
    return found


@dataclass(frozen=True)
class Points:
    """Complex points in a scratch buffer: for each, a vector of real parts and one of imaginary parts."""

    vec: Vectors
    buffer: Buffer

    def get(self, place: Index) -> Complex:
        """Load a point."""
        lanes = self.vec.lanes
        return bind(self.vec.load(self.buffer, place, 0)), bind(self.vec.load(self.buffer, place, lanes))

    def set(self, place: Index, value: Complex) -> None:
        """Store a point."""
        self.vec.store(self.buffer, value[0], place, 0)
        self.vec.store(self.buffer, value[1], place, self.vec.lanes)

    def read(self, place: Index, first: int, last: int) -> Complex:
        """Load a point, wherever it lies."""
        del first, last
        return self.get(place)

    def write(self, place: Index, first: int, last: int, value: Complex) -> None:
        """Store a point, wherever it lies."""
        del first, last
        self.set(place, value)


def points(vec: Vectors, count: int) -> Points:
    """Return room for some points, private to the current block."""
    return Points(vec, scratch((count, 2 * vec.lanes)))


@dataclass(frozen=True)
class Transform:
    """A complex transform of one length.

    Attributes:
        vec: Vectors that hold one part of a point.
        length: Number of points.
        largest: Largest power of two among the radices.
        table: Roots of unity `[step * length, 2]`.
        step: Every which root of the table is one of `length`.
    """

    vec: Vectors
    length: int
    largest: int
    table: Buffer
    step: int = 1

    def write(
        self, work: Sequence[Points], read: Read, write: Write | None = None, *, inverse: bool = False
    ) -> Points | None:
        """Transform what `read` gives.

        Args:
            work: Two areas; the first pass writes the first one.
            read: Source.
            write: Target of the last pass.
            inverse: Whether to transform back, which needs `write`; the result is not divided by the length.

        Returns:
            Where the result lies, if there is no `write`.
        """
        source, result = (_turned_read(read), _turned_write(write)) if inverse else (read, write)
        below, stride = self.length, 1
        factors = radices(self.length, self.largest) or [1]
        for number, radix in enumerate(factors):
            area = work[number % 2]
            target = result if result is not None and number == len(factors) - 1 else area.write
            below //= radix
            self._pass(radix, below, stride, source, target)
            source, stride = area.read, stride * radix
        return None if write is not None else work[(len(factors) - 1) % 2]

    def root(self, index: Index) -> Complex:
        """Vectors of one root of unity of `length`."""
        real, imaginary = self.table[index * self.step, 0], self.table[index * self.step, 1]
        return bind(self.vec.splat(real)), bind(self.vec.splat(imaginary))

    def _pass(self, radix: int, count: int, stride: int, read: Read, write: Write) -> None:
        """y[q + stride (radix k + j)] = w^(stride k j) sum_i x[q + stride (k + count i)] exp(-2 pi i ij / radix)."""
        if radix > 8 or (radix % 2 and radix not in UNROLLED_PRIMES and radix > 1):
            self._large_prime_pass(radix, count, stride, read, write)
            return
        span = stride * count
        with serial(0, count) as k:
            twiddles = [self.root(k * (stride * j)) for j in range(1, radix)] if count > 1 else []
            with serial(0, stride) as q:
                inputs = [read(q + stride * (k + count * i), span * i, span * (i + 1) - 1) for i in range(radix)]
                for j, value in enumerate(self._butterfly(inputs)):
                    turned = multiply(value, twiddles[j - 1]) if j and twiddles and value else value
                    bounds = (stride * j, stride * (j + 1) - 1) if count == 1 else (0, self.length - 1)
                    write(q + stride * (k * radix + j), *bounds, turned or self._zero())

    def _large_prime_pass(self, radix: int, count: int, stride: int, read: Read, write: Write) -> None:
        """The same pass by its definition, for radices too large to unroll; mirrored points share their factors."""
        half = radix // 2
        sums, differences = points(self.vec, half), points(self.vec, half)
        whole, rest = divmod(half, PAIRS_AT_ONCE)
        with serial(0, count) as k, serial(0, stride) as q:
            start = self._mirrored(radix, q + stride * k, stride * count, read, sums, differences)
            total = self.vec.register(start[0]), self.vec.register(start[1])
            with serial(0, half) as i:
                for part, value in zip(total, sums.get(i), strict=True):
                    part.set(part.get() + value)
            write(q + stride * (k * radix), 0, self.length - 1, (total[0].get(), total[1].get()))

            def outputs(first: Index, number: int) -> None:
                for j, pair in enumerate(self._output_pairs(radix, first, number, start, sums, differences)):
                    for place, value in zip((first + j, radix - (first + j)), pair, strict=True):
                        turned = multiply(value, self.root(k * place * stride))
                        write(q + stride * (k * radix + place), 0, self.length - 1, turned)

            with serial(0, whole) as group:
                outputs(group * PAIRS_AT_ONCE + 1, PAIRS_AT_ONCE)
            outputs(whole * PAIRS_AT_ONCE + 1, rest)

    def _mirrored(self, radix: int, first: Expr, apart: int, read: Read, sums: Points, differences: Points) -> Complex:
        """Store the sum and the difference of each two mirrored inputs; return the first input."""
        with serial(0, radix // 2) as i:
            low, high = (
                read(first + apart * place, 0, self.length - 1) or self._zero() for place in (i + 1, radix - 1 - i)
            )
            sums.set(i, _known(_add(low, high)))
            differences.set(i, _known(_subtract(low, high)))
        return read(first, 0, self.length - 1) or self._zero()

    def _output_pairs(
        self, radix: int, first: Index, number: int, start: Complex, sums: Points, differences: Points
    ) -> list[tuple[Complex, Complex]]:
        """Outputs from `first` on, each with its mirror: x_0 + sum_i cos s_i, plus and minus the sum of i sin d_i."""
        even = [(self.vec.register(start[0]), self.vec.register(start[1])) for _ in range(number)]
        odd = [(self.vec.register(0.0), self.vec.register(0.0)) for _ in range(number)]
        with serial(0, radix // 2) as i:
            both, apart = sums.get(i), differences.get(i)
            for j in range(number):
                cosine, sine = self.root((i + 1) * (first + j) % radix * (self.length // radix))
                for part in range(2):
                    even[j][part].set(even[j][part].get() + cosine * both[part])
                    odd[j][part].set(odd[j][part].get() + sine * apart[part])
        pairs: list[tuple[Complex, Complex]] = []
        for (a, b), (c, d) in zip(even, odd, strict=True):
            here = bind(a.get() - d.get()), bind(b.get() + c.get())
            pairs.append((here, (bind(a.get() + d.get()), bind(b.get() - c.get()))))
        return pairs

    def _zero(self) -> Complex:
        return self.vec.splat(0.0), self.vec.splat(0.0)

    def _butterfly(self, inputs: list[Complex | None]) -> list[Complex | None]:
        """The transform of a few points."""
        match len(inputs):
            case 1:
                return inputs
            case 2:
                return [_add(*inputs), _subtract(*inputs)]
            case 4:
                return _four(inputs)
            case 8:
                return _eight(inputs)
            case _:
                return self._odd([value or self._zero() for value in inputs])

    def _odd(self, inputs: list[Complex]) -> list[Complex | None]:
        """An odd number of points, mirrored ones together."""
        size, half = len(inputs), len(inputs) // 2
        sums = [_known(_add(inputs[i], inputs[size - i])) for i in range(1, half + 1)]
        differences = [_known(_subtract(inputs[i], inputs[size - i])) for i in range(1, half + 1)]
        outputs: list[Complex | None] = [None] * size
        total = inputs[0]
        for value in sums:
            total = total[0] + value[0], total[1] + value[1]
        outputs[0] = bind(total[0]), bind(total[1])
        for j in range(1, half + 1):
            angles = [2 * math.pi * ((i * j) % size) / size for i in range(1, half + 1)]
            even = self._weighted(inputs[0], sums, [math.cos(angle) for angle in angles])
            odd = self._weighted(None, differences, [math.sin(angle) for angle in angles])
            outputs[j] = bind(even[0] + odd[1]), bind(even[1] - odd[0])
            outputs[size - j] = bind(even[0] - odd[1]), bind(even[1] + odd[0])
        return outputs

    def _weighted(self, start: Complex | None, values: list[Complex], factors: list[float]) -> Complex:
        parts: list[Expr] = []
        for part in range(2):
            total = None if start is None else start[part]
            for value, factor in zip(values, factors, strict=True):
                product = value[part] * self.vec.splat(factor)
                total = product if total is None else total + product
            assert total is not None
            parts.append(bind(total))
        return parts[0], parts[1]


def multiply(a: Complex, b: Complex) -> Complex:
    """Multiply two complex numbers."""
    return bind(a[0] * b[0] - a[1] * b[1]), bind(a[0] * b[1] + a[1] * b[0])


def conjugate(a: Complex) -> Complex:
    """Mirror at the real axis."""
    return a[0], -a[1]


def split_pair(z: Complex, mirror: Complex, root: Complex) -> tuple[Complex, Complex]:
    """Take the transform of 2n real numbers out of that of n complex ones made of its even and odd places.

    Args:
        z: The complex transform at k.
        mirror: The same at n - k, which at k = 0 is again that at 0.
        root: The k-th root of unity of 2n.

    Returns:
        Their sum is twice the real numbers' transform at k, their difference twice the conjugate of that at n - k.
    """
    even = bind(z[0] + mirror[0]), bind(z[1] - mirror[1])
    odd = bind(z[1] + mirror[1]), bind(mirror[0] - z[0])
    return even, multiply(odd, root)


def merge_pair(even: Complex, turned: Complex, root: Complex) -> tuple[Complex, Complex]:
    """Undo `split_pair`: the complex transform at k and at n - k."""
    odd = multiply(turned, conjugate(root))
    return (
        (bind(even[0] - odd[1]), bind(even[1] + odd[0])),
        (bind(even[0] + odd[1]), bind(odd[0] - even[1])),
    )


def for_each_pair(count: int, body: Callable[[Index, Index, Index], None]) -> None:
    """Run `body(k, n - k, n - k)` for each pair of n points, where the first is `body(0, 0, n)`."""
    body(0, 0, count)
    with serial(0, count // 2) as pair:
        k = bind(pair + 1)
        body(k, count - k, count - k)


def _add(a: Complex | None, b: Complex | None) -> Complex | None:
    """Sum; None is zero."""
    if a is None or b is None:
        return b if a is None else a
    return bind(a[0] + b[0]), bind(a[1] + b[1])


def _subtract(a: Complex | None, b: Complex | None) -> Complex | None:
    if a is None or b is None:
        return a if b is None else (-b[0], -b[1])
    return bind(a[0] - b[0]), bind(a[1] - b[1])


def _known(value: Complex | None) -> Complex:
    assert value is not None
    return value


def _turned_right(a: Complex | None) -> Complex | None:
    """Product with -i."""
    return None if a is None else (a[1], -a[0])


def _four(a: Sequence[Complex | None]) -> list[Complex | None]:
    even, apart = _add(a[0], a[2]), _subtract(a[0], a[2])
    odd, turned = _add(a[1], a[3]), _turned_right(_subtract(a[1], a[3]))
    return [_add(even, odd), _add(apart, turned), _subtract(even, odd), _subtract(apart, turned)]


def _eight(a: Sequence[Complex | None]) -> list[Complex | None]:
    even, odd = _four(a[0::2]), _four(a[1::2])
    odd = [odd[0], _turned_eighth(odd[1]), _turned_right(odd[2]), _turned_right(_turned_eighth(odd[3]))]
    return [*(_add(e, o) for e, o in zip(even, odd, strict=True)), *(map(_subtract, even, odd))]


def _turned_eighth(a: Complex | None) -> Complex | None:
    """Product with exp(-i pi / 4)."""
    if a is None:
        return None
    lanes = lanes_of(a[0])
    factor = splat(math.sqrt(0.5), lanes)
    return bind((a[0] + a[1]) * factor), bind((a[1] - a[0]) * factor)


def _turned_read(read: Read) -> Read:
    """Source with its parts exchanged."""

    def turned(place: Index, first: int, last: int) -> Complex | None:
        value = read(place, first, last)
        return None if value is None else _exchanged(value)

    return turned


def _turned_write(write: Write | None) -> Write | None:
    return None if write is None else lambda place, first, last, value: write(place, first, last, _exchanged(value))


def _exchanged(value: Complex) -> Complex:
    return value[1], value[0]
