"""Parts of PVT against timm's second version of it.

timm has no PVT v1. Attention with spatial reduction is the same in both; the second version has overlapping patches, a
depthwise convolution in the MLP, norms between stages, and no positions.
"""

from typing import Any

import numpy as np
import pytest
import torch

from ir.component import ChannelMixer, TokenMixer
from nas.checks.component import relative_error
from nas.checks.subjects import Subject, run
from searchspaces.channel_mixers.depthwise_mlp import DepthwiseMlp
from searchspaces.token_mixers.spatial_reduction_attention import SpatialReductionAttention
from tests.crosscheck.timm_models import TOLERANCE, divided, fitted, renamed, timm_model, weights_of

pytestmark = pytest.mark.crosscheck
RULES = [
    (r"^(q|k|v)\.weight", r"part.\1"),
    (r"^(q|k|v)\.bias", r"part.\1_bias"),
    (r"^proj\.weight", "part.out"),
    (r"^proj\.bias", "part.out_bias"),
    (r"^sr\.weight", "part.reduce"),
    (r"^sr\.bias", "part.reduce_bias"),
    (r"^norm\.weight", "part.norm_scale"),
    (r"^norm\.bias", "part.norm_bias"),
    (r"^fc1\.weight", "part.up"),
    (r"^fc1\.bias", "part.up_bias"),
    (r"^dwconv\.weight", "part.kernel"),
    (r"^dwconv\.bias", "part.kernel_bias"),
    (r"^fc2\.weight", "part.down"),
    (r"^fc2\.bias", "part.down_bias"),
]
WIDTHS, HEADS, REDUCTIONS, EXPANSIONS = (32, 64, 160, 256), (1, 2, 5, 8), (8, 4, 2, 1), (8, 8, 4, 4)
SIDE = 16


def assert_equal_modules(component: TokenMixer | ChannelMixer, width: int, module: torch.nn.Module) -> None:
    """A component gives with a module's weights what the module gives."""
    case = type(component).cases[0]
    subject = Subject("pvt", component, type(case)(grid=(SIDE, SIDE), d_model=width))
    weights = divided(weights_of(module), "kv.", lambda size: {"k.": size // 2, "v.": size // 2})
    graph = subject.graph()
    x = np.random.default_rng(1).standard_normal((2, SIDE, SIDE, width))
    found = run(graph, fitted(graph, renamed(weights, RULES)), {"x": x})
    with torch.no_grad():
        expected = module(torch.from_numpy(x).flatten(1, 2), (SIDE, SIDE)).numpy()
    assert relative_error(found, expected.reshape(found.shape)) < TOLERANCE


@pytest.mark.parametrize("stage", range(4))
def test_pvt_parts_equal_timm(stage):
    """Attention and MLP of each stage equal those of timm's pvt_v2_b0."""
    model: Any = timm_model("pvt_v2_b0")
    block = model.stages[stage].blocks[0]
    attention = SpatialReductionAttention.create({"num_heads": HEADS[stage], "reduction": REDUCTIONS[stage]})
    assert_equal_modules(attention, WIDTHS[stage], block.attn)
    assert_equal_modules(DepthwiseMlp.create({"expansion": float(EXPANSIONS[stage])}), WIDTHS[stage], block.mlp)
