"""Elementary functions on float32 vectors as TIR expressions, for any number of lanes (1 is a scalar).

LLVM lowers `exp`, `erf` and `tanh` on vectors to one libm call a lane, some 70 times slower. The functions here are
branch-free polynomials. Accuracy, each measured against float64 in the tests, relative unless said otherwise:

| function | error | range, and outside it |
|---|---|---|
| `exp` | 2e-7 | [-86.6, 88.3]; exactly 0 below (also for -inf), saturates at 2.4e38 above |
| `exp2_nonpositive` | 2e-7; degree 5: 3e-7; degree 3: 1e-4 | [-125, 0]; 2^-125 below |
| `log` | 3e-7 of max(result, 1e-2) | normal positive numbers |
| `log1p_unit` | 3e-7 | [0, 1] |
| `tanh` | 5e-7 | all |
| `erf` | 6e-7 | all |
| `sigmoid`, `silu`, `softplus` | 5e-7 | [-87, 87] |
| `gelu` | 8e-7 of max(result, 1) | all |
| `gelu_tanh` | 3e-7 of max(result, 1) | all |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import numpy as np

from codegen._tvm import Expr, IRBuilder, tir_builder, tirx

LOG2_E: Final = 1.4426950408889634
# ln 2 in two parts (Cody and Waite): the first has 9 significant bits, so its product with an exponent is exact.
LN2_HIGH: Final = 0.693359375
LN2_LOW: Final = -2.12194440e-4
EXP_LOWEST: Final = -86.6  # the smallest power is then 2^-125, whose products with [0.7, 1.5] are normal numbers
EXP_HIGHEST: Final = 88.37
EXP2_LOWEST: Final = -125.0
MANTISSA_BITS: Final = 23

# Minimax of (e^x - 1 - x) / x^2 on |x| <= ln(2)/2, highest power first (Cephes, expf).
_EXP_TAIL: Final = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
# Minimax of 2^x on [-1/2, 1/2] in relative error (before rounding 7e-5, 7e-8, 2e-9), highest power first.
_EXP2: Final = {
    3: (5.5171669057926094e-2, 2.4261112219321643e-1, 6.932609854606554e-1, 9.999280735394012e-1),
    5: (
        1.3276471993203906e-3,
        9.675541334454568e-3,
        5.5507132734958595e-2,
        2.4022119723839994e-1,
        6.931469670647618e-1,
        1.0000000716546849,
    ),
    6: (
        1.5345812006346848e-4,
        1.3399931219189559e-3,
        9.61848895710427e-3,
        5.550328776965331e-2,
        2.4022646890634194e-1,
        6.931472057372677e-1,
        1.0000000005541665,
    ),
}
# Rational fits of erf on [-4, 4] and tanh on [-7.9, 7.9], in x^2, highest power first (Eigen, generic packet math).
_ERF_ABOVE: Final = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_BELOW: Final = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
_TANH_ABOVE: Final = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_BELOW: Final = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
# atanh(s)/s = 1 + s^2/3 + s^4/5 + ..., highest power first; 9 terms leave 2e-10 at s = 1/3, 5 leave 2e-9 at s = 0.172.
_ATANH_WIDE: Final = tuple(1 / (2 * n + 1) for n in range(8, -1, -1))
_ATANH_NARROW: Final = tuple(1 / (2 * n + 1) for n in range(5, -1, -1))


_SCOPE: Final[ContextVar[str]] = ContextVar("scope", default="global")


@contextmanager
def names_in(scope: str) -> Iterator[None]:
    """Keep named values in a kind of memory while a function is written: `local` where each thread has its own."""
    token = _SCOPE.set(scope)
    try:
        yield
    finally:
        _SCOPE.reset(token)


def lanes_of(x: Expr) -> int:
    """Return the number of lanes of an expression."""
    return x.ty.dtype.lanes


def splat(value: float | Expr, lanes: int) -> Expr:
    """Return a vector whose lanes all hold a scalar."""
    scalar = value if isinstance(value, Expr) else tirx.const(float(value), "float32")
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def splat_int(value: int | Expr, lanes: int) -> Expr:
    """Return an int32 vector whose lanes all hold a scalar."""
    scalar = value if isinstance(value, Expr) else tirx.const(value, "int32")
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """Name a subexpression, so that it is computed once however often `body` uses it.

    While a function is being written the name is a statement of it; TVM's simplifier trips over deeply nested let
    expressions, which remain for expressions made outside a function.
    """
    if IRBuilder.is_in_scope():
        return body(keep(value))
    name = tirx.Var("x", value.ty)
    return tirx.Let(name, value, body(name))


def keep(value: Expr) -> Expr:
    """Compute a value at this place of the function being written, and return an expression that reads it.

    A float goes through a local buffer, which LLVM turns into a register. A TVM binding would not do: the simplifier
    copies the bound expression to every use, and so doubles the code at each step of a long computation.
    """
    if not str(value.ty.dtype).startswith("float"):
        return tir_builder.Bind(value)
    return _through_memory(value, "float32")


def keep_integers(value: Expr) -> Expr:
    """Compute int32 positions at this place, out of sight of the simplifier."""
    return _through_memory(value, "int32")


def _through_memory(value: Expr, dtype: str) -> Expr:
    lanes = lanes_of(value)
    buffer = tir_builder.alloc_buffer((lanes,), dtype, scope=_SCOPE.get(), layout=None)
    place = tirx.Ramp(0, 1, lanes) if lanes > 1 else 0
    tir_builder.buffer_store(buffer, value, [place])
    return buffer[place]


def polynomial(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Evaluate a polynomial by Horner's rule, highest power first."""
    lanes = lanes_of(x)

    def horner(v: Expr) -> Expr:
        total = splat(coefficients[0], lanes)
        for coefficient in coefficients[1:]:
            total = total * v + splat(coefficient, lanes)
        return total

    return let(x, horner)


def clamp(x: Expr, low: float, high: float) -> Expr:
    """Limit to `[low, high]`."""
    lanes = lanes_of(x)
    return tirx.max(tirx.min(x, splat(high, lanes)), splat(low, lanes))


def exp(x: Expr) -> Expr:
    """Exponential; 0 for every argument below -86.6, minus infinity included."""
    lanes = lanes_of(x)

    def with_power(c: Expr, power: Expr) -> Expr:
        rest = c - power * splat(LN2_HIGH, lanes) - power * splat(LN2_LOW, lanes)
        value = let(rest, lambda r: polynomial(r, _EXP_TAIL) * (r * r) + (r + splat(1.0, lanes)))
        return _scale_by_power(value, power)

    def with_argument(argument: Expr) -> Expr:
        value = let(
            clamp(argument, EXP_LOWEST, EXP_HIGHEST),
            lambda c: let(tirx.nearbyint(c * splat(LOG2_E, lanes)), lambda power: with_power(c, power)),
        )
        return tirx.Select(argument < splat(EXP_LOWEST, lanes), splat(0.0, lanes), value)

    return let(x, with_argument)


def exp2_nonpositive(x: Expr, degree: int = 6) -> Expr:
    """2^x for x <= 0 in the fewest operations; arguments below -125, minus infinity included, give 2^-125 and not 0.

    Args:
        x: Argument.
        degree: Of the polynomial: 6, 5 (error 3e-7) or 3 (error 1e-4).
    """

    def with_argument(c: Expr) -> Expr:
        return let(tirx.nearbyint(c), lambda power: _scale_by_power(polynomial(c - power, _EXP2[degree]), power))

    return let(tirx.max(x, splat(EXP2_LOWEST, lanes_of(x))), with_argument)


def _scale_by_power(x: Expr, power: Expr) -> Expr:
    """Multiply a number near 1 by 2^power, an integer in float32, by adding to the exponent."""
    exponent = _cast(power, "int32") << splat_int(MANTISSA_BITS, lanes_of(x))
    return _reinterpret(_reinterpret(x, "int32") + exponent, "float32")


def log(x: Expr) -> Expr:
    """Natural logarithm of a positive normal number."""
    lanes = lanes_of(x)
    mantissa_mask, half_root = (1 << MANTISSA_BITS) - 1, 0x3F3504F3  # bits of sqrt(1/2)

    def with_bits(bits: Expr) -> Expr:
        shifted = bits - splat_int(half_root, lanes)
        power = _cast(shifted >> splat_int(MANTISSA_BITS, lanes), "float32")
        mantissa = _reinterpret((shifted & splat_int(mantissa_mask, lanes)) + splat_int(half_root, lanes), "float32")
        one = splat(1.0, lanes)
        ratio = let(mantissa, lambda m: (m - one) / (m + one))
        return let(
            power, lambda p: _twice_atanh(ratio, _ATANH_NARROW) + p * splat(LN2_LOW, lanes) + p * splat(LN2_HIGH, lanes)
        )

    return let(_reinterpret(x, "int32"), with_bits)


def log1p_unit(x: Expr) -> Expr:
    """Accurate log(1 + x) for x in [0, 1]."""
    return let(x, lambda u: _twice_atanh(u / (u + splat(2.0, lanes_of(u))), _ATANH_WIDE))


def _twice_atanh(ratio: Expr, coefficients: tuple[float, ...]) -> Expr:
    return let(ratio, lambda s: let(s * s, lambda q: (s + s) * polynomial(q, coefficients)))


def _odd_rational(x: Expr, limit: float, above: tuple[float, ...], below: tuple[float, ...]) -> Expr:
    def with_clamped(c: Expr) -> Expr:
        return let(c * c, lambda q: c * polynomial(q, above) / polynomial(q, below))

    return let(clamp(x, -limit, limit), with_clamped)


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent."""
    return _odd_rational(x, 7.90531110763549805, _TANH_ABOVE, _TANH_BELOW)


def erf(x: Expr) -> Expr:
    """Error function."""
    return _odd_rational(x, 4.0, _ERF_ABOVE, _ERF_BELOW)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x))."""
    one = splat(1.0, lanes_of(x))
    return one / (one + exp(-x))


def silu(x: Expr) -> Expr:
    """X times its sigmoid."""
    return let(x, lambda v: v / (splat(1.0, lanes_of(v)) + exp(-v)))


def softplus(x: Expr) -> Expr:
    """log(1 + exp(x)), accurate for very negative arguments too."""

    def with_argument(v: Expr) -> Expr:
        zero = splat(0.0, lanes_of(v))
        return tirx.max(v, zero) + log1p_unit(exp(tirx.min(v, -v)))

    return let(x, with_argument)


def gelu(x: Expr) -> Expr:
    """Gaussian error linear unit, by the error function."""
    lanes = lanes_of(x)
    return let(x, lambda v: v * splat(0.5, lanes) * (splat(1.0, lanes) + erf(v * splat(math.sqrt(0.5), lanes))))


def gelu_tanh(x: Expr) -> Expr:
    """Gaussian error linear unit, its tanh approximation."""
    lanes = lanes_of(x)

    def with_argument(v: Expr) -> Expr:  # (1 + tanh(z)) / 2 is the sigmoid of 2 z, without its cancellation
        doubled = v * (splat(2 * _GELU_LINEAR, lanes) + v * v * splat(2 * _GELU_LINEAR * _GELU_CUBIC, lanes))
        return v / (splat(1.0, lanes) + exp(-doubled))

    return let(x, with_argument)


_GELU_LINEAR: Final = math.sqrt(2 / math.pi)
_GELU_CUBIC: Final = 0.044715


def relu(x: Expr) -> Expr:
    """Larger of x and 0."""
    return tirx.max(x, splat(0.0, lanes_of(x)))


def relu2(x: Expr) -> Expr:
    """Square of the larger of x and 0."""
    return let(relu(x), lambda v: v * v)


def rsqrt(x: Expr) -> Expr:
    """1 / sqrt(x), correctly rounded in both steps."""
    return splat(1.0, lanes_of(x)) / tirx.sqrt(x)


def _cast(x: Expr, scalar: str) -> Expr:
    return tirx.Cast(_vector_type(scalar, lanes_of(x)), x)


def _reinterpret(x: Expr, scalar: str) -> Expr:
    return tirx.reinterpret(_vector_type(scalar, lanes_of(x)), x)


def _vector_type(scalar: str, lanes: int) -> str:
    return scalar if lanes == 1 else f"{scalar}x{lanes}"


ACTIVATIONS: Final[dict[str, Callable[[Expr], Expr]]] = {
    "identity": lambda x: x,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "softplus": softplus,
    "relu2": relu2,
}
"""Every activation that an epilogue knows, on vectors."""


def _erf_numpy(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _sigmoid_numpy(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


ACTIVATION_REFERENCES: Final[dict[str, Callable[[np.ndarray], np.ndarray]]] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + _erf_numpy(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(_GELU_LINEAR * (x + _GELU_CUBIC * x**3))),
    "silu": lambda x: x * _sigmoid_numpy(x),
    "sigmoid": _sigmoid_numpy,
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(0.0, x),
    "relu2": lambda x: np.maximum(x, 0.0) ** 2,
}
"""The same activations in float64 numpy."""
