"""Swin-T against timm."""

import pytest

from searchspaces.space import load_space
from tests.crosscheck.timm_models import (
    assert_equal_outputs,
    divided,
    first_layers,
    renamed,
    timm_model,
    weights_of,
)

pytestmark = pytest.mark.crosscheck


def test_swin_equals_timm():
    """With the weights of timm's swin_tiny_patch4_window7_224, zoo/swin gives its logits."""
    model = timm_model("swin_tiny_patch4_window7_224")
    space = load_space("zoo/swin")
    first = first_layers(space)
    weights = divided(weights_of(model), ".qkv.", lambda size: {f".{name}.": size // 3 for name in "qkv"})
    weights = {name: array.T if name.endswith("bias_table") else array for name, array in weights.items()}
    rules = [
        (r"^patch_embed\.proj\.weight", "stem.conv0"),
        (r"^patch_embed\.proj\.bias", "stem.conv0_bias"),
        (r"^patch_embed\.norm\.weight", "stem.norm0_scale"),
        (r"^patch_embed\.norm\.bias", "stem.norm0_bias"),
        (r"^layers\.(\d)\.downsample\.norm\.weight", r"transitions.\1.norm_scale"),
        (r"^layers\.(\d)\.downsample\.norm\.bias", r"transitions.\1.norm_bias"),
        (r"^layers\.(\d)\.downsample\.reduction\.weight", r"transitions.\1.weight"),
        (r"^layers\.(\d)\.blocks\.(\d)", lambda found: f"layers.{first[int(found[1])] + int(found[2])}"),
        (r"\.norm1\.weight$", ".norm_mixer.scale"),
        (r"\.norm1\.bias$", ".norm_mixer.bias"),
        (r"\.norm2\.weight$", ".norm_channel.scale"),
        (r"\.norm2\.bias$", ".norm_channel.bias"),
        (r"\.attn\.relative_position_bias_table$", ".mixer.relative_position"),
        (r"\.attn\.proj\.weight$", ".mixer.out"),
        (r"\.attn\.proj\.bias$", ".mixer.out_bias"),
        (r"\.attn\.([qkv])\.weight$", r".mixer.\1"),
        (r"\.attn\.([qkv])\.bias$", r".mixer.\1_bias"),
        (r"\.mlp\.fc1\.weight$", ".channel_mixer.up"),
        (r"\.mlp\.fc1\.bias$", ".channel_mixer.up_bias"),
        (r"\.mlp\.fc2\.weight$", ".channel_mixer.down"),
        (r"\.mlp\.fc2\.bias$", ".channel_mixer.down_bias"),
        (r"^norm\.weight", "norm.scale"),
        (r"^head\.fc\.weight", "head.weight"),
        (r"^head\.fc\.bias", "head.weight_bias"),
    ]
    assert_equal_outputs(space, model, renamed(weights, rules))
