"""The kernels that stand for their families: every family has some, and the torch calls are the same functions."""

from __future__ import annotations

import pytest
import torch

from codegen import kernel_cases
from codegen.container import relative_error
from codegen.kernel_cases import FAMILIES, KernelCase

CASES = kernel_cases.make_cases()


def test_kernel_cases_cover_every_family():
    """Each name of `--families` chooses some, and together they choose all."""
    chosen = [case.name for family in FAMILIES for case in kernel_cases.cases_of([family])]
    assert all(kernel_cases.cases_of([family]) for family in FAMILIES)
    assert sorted(chosen) == sorted(case.name for case in CASES)
    assert len(kernel_cases.cases_of([])) == len(CASES)


def test_kernel_cases_are_the_same_each_time():
    """A case goes to another process by its number."""
    assert [(case.name, case.kernel.key) for case in CASES] == [
        (case.name, case.kernel.key) for case in kernel_cases.make_cases()
    ]


@pytest.mark.parametrize("case", [case for case in CASES if case.eager], ids=lambda case: f"{case.family} {case.name}")
def test_kernel_cases_torch_call_is_the_same_function(case: KernelCase):
    """Held against the kernel's float64 reference; torch sums a few thousand float32 products in its own order."""
    operands = case.operands()
    assert case.eager is not None
    found = case.eager(torch, *(torch.from_numpy(array) for array in operands)).numpy()
    expected = case.kernel.reference(*operands)[0]
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= 1e-5
