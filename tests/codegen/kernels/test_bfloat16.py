"""The bfloat16 vocabulary against numpy, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from codegen import _tvm
from codegen._tvm import Expr, IRBuilder
from codegen._tvm import tir_builder as T
from codegen.kernels.bfloat16 import Bfloat16, load_vector, store_vector
from codegen.kernels.emit import serial
from ir.rounding import bfloat16_bits, from_bfloat16_bits, round_to_bfloat16
from tests.codegen.kernels import checking

COUNT = 4096
CASES = (checking.NATIVE, *checking.ISAS)


def _apply(
    case: str, write: Callable[[Bfloat16, list[Expr]], Expr], inputs: list[np.ndarray], result: str, ratio: float = 1
) -> np.ndarray:
    """Run an expression over vectors of the inputs; `ratio` result lanes for each lane."""
    target = checking.target_of(case)
    isa = target.isa
    words, lanes = Bfloat16(isa), int(isa.lanes * ratio)
    size = int(COUNT * ratio)
    with IRBuilder() as builder, T.prim_func(private=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, _tvm.KERNEL_ATTRIBUTE: True})
        operands = [T.arg(f"x{i}", T.buffer((COUNT,), x.dtype.name, layout=None)) for i, x in enumerate(inputs)]
        y = T.arg("y", T.buffer((size,), result, layout=None))
        with words.instructions(), serial(0, COUNT // isa.lanes) as step:
            vectors = [load_vector(x, isa.lanes, step * isa.lanes) for x in operands]
            store_vector(y, write(words, vectors), lanes, step * lanes)
    library = _tvm.compile_functions({"main": builder.get()}, _tvm.Target(target.to_tvm()))
    tensors = [_tvm.device_array(array) for array in (*inputs, np.zeros(size, result))]
    library["main"](*tensors)
    return tensors[-1].numpy()


def _numbers(seed: int = 0) -> np.ndarray:
    """Numbers of every size, ties, infinities and what is not a number; none below 2^-126 but zero."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, COUNT, dtype=np.uint64).astype(np.uint32)
    bits[::4] = (bits[::4] & 0xFFFF0000) | 0x8000  # halfway between two neighbours
    numbers = bits.view(np.float32)
    numbers[np.abs(numbers) < 2.0**-125] = 0.0
    numbers[:6] = [np.inf, -np.inf, np.nan, 0.0, -0.0, np.finfo(np.float32).max]
    numbers[6:8] = np.array([0x7FFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    return numbers


def _same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, except that any number that is none equals any other."""
    nan = np.isnan(from_bfloat16_bits(expected))
    assert np.array_equal(np.isnan(from_bfloat16_bits(actual)), nan)
    assert np.array_equal(actual[~nan], expected[~nan])


@pytest.mark.parametrize("case", CASES)
def test_round_goes_to_nearest_even(case: str) -> None:
    """Every float32 becomes the bfloat16 that numpy's arithmetic says, infinities and NaN included."""
    x = _numbers()
    _same_bits(_apply(case, lambda words, v: words.round(v[0]), [x], "uint16"), bfloat16_bits(x))


@pytest.mark.parametrize("case", CASES)
def test_round_words_keeps_the_order(case: str) -> None:
    """Neighbouring numbers share a word, the even one in its lower half."""
    x = _numbers(1)
    words = _apply(case, lambda words, v: words.round_words(v[0]), [x], "int32", 0.5)
    _same_bits(words.view(np.uint16), bfloat16_bits(x))


@pytest.mark.parametrize("case", CASES)
def test_round_numbers_is_rounding_there_and_back(case: str) -> None:
    """The float32 result has the rounded value."""
    x = _numbers(2)
    rounded = _apply(case, lambda words, v: words.round_numbers(v[0]), [x], "float32")
    np.testing.assert_array_equal(rounded, round_to_bfloat16(x))


@pytest.mark.parametrize("case", CASES)
def test_pair_interleaves_two_vectors(case: str) -> None:
    """Lane i of both operands meets in word i, from which `even` and `odd` get it back."""
    x, y = _numbers(3), _numbers(4)
    paired = _apply(case, lambda words, v: words.pair(*v), [x, y], "int32")
    _same_bits(paired.view(np.uint16)[::2], bfloat16_bits(x))
    _same_bits(paired.view(np.uint16)[1::2], bfloat16_bits(y))
    lower = _apply(case, lambda words, v: words.even(v[0]), [paired], "float32")
    upper = _apply(case, lambda words, v: words.odd(v[0]), [paired], "float32")
    np.testing.assert_array_equal(lower, round_to_bfloat16(x))
    np.testing.assert_array_equal(upper, round_to_bfloat16(y))


@pytest.mark.parametrize("case", CASES)
def test_dot_adds_both_products(case: str) -> None:
    """Products of bfloat16 numbers are exact in float32, so only the two additions round."""
    rng = np.random.default_rng(5)
    total = rng.standard_normal(COUNT).astype(np.float32)
    a, b = (bfloat16_bits(rng.standard_normal(2 * COUNT)) for _ in range(2))
    sums = _apply(case, lambda words, v: words.dot(*v), [total, a.view(np.int32), b.view(np.int32)], "float32")
    products = from_bfloat16_bits(a).astype(np.float64) * from_bfloat16_bits(b)
    expected = total + products.reshape(-1, 2).sum(-1)
    np.testing.assert_allclose(sums, expected, rtol=0, atol=4e-6)  # 8 half places of a sum below 16


def test_portable_levels_have_no_bfloat16_instructions() -> None:
    """Code for x86-64-v4 and below never holds the instruction, whatever this machine has."""
    for name in checking.ISAS:
        assert not checking.target_of(name).isa.bf16_dot
