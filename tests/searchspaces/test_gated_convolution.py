"""What recursive gated convolution contains, and what its order costs."""

import numpy as np
import pytest

from ir.component import Case
from ir.cost import profile
from nas.checks.subjects import SCOPE, Subject, random_inputs, random_params, run
from searchspaces import reference
from searchspaces.registry import get


def subject(d_model: int, grid: tuple[int, int], **options) -> Subject:
    """A recursive gated convolution alone."""
    component = get("token_mixer", "recursive_gated_conv").create(options)
    return Subject("gated convolution", component, Case(d_model=d_model, grid=grid))


def test_order_one_is_a_gated_convolution():
    """With one gate the output is (x W_p) times a convolution of x W_q, mapped by W_out."""
    graph = subject(6, (4, 5), order=1, kernel_size=3, scale=0.5).graph()
    params, inputs = random_params(graph), random_inputs(graph)
    own = {name.removeprefix(f"{SCOPE}."): array for name, array in params.items()}
    x = inputs["x"]
    seen = reference.convolve(x @ own["q"] + own["q_bias"], own["depthwise"], groups=6) + own["depthwise_bias"]
    expected = ((x @ own["p"] + own["p_bias"]) * 0.5 * seen) @ own["out"] + own["out_bias"]
    np.testing.assert_allclose(run(graph, params, inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
def test_cost_stays_under_the_published_bound(order):
    """Multiply-adds a pixel stay below D (2 K^2 + 11 D / 3 + 2) at every order (Rao et al. 2022, equation 3.6)."""
    d_model, kernel_size = 64, 7
    macs = profile(subject(d_model, (14, 14), order=order, kernel_size=kernel_size).resized(batch=1).graph()).macs
    assert macs <= 14 * 14 * d_model * (2 * kernel_size**2 + 11 * d_model / 3 + 2)
