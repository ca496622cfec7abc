"""TNT-S against timm."""

import re

import numpy as np
import pytest

from searchspaces.space import load_space
from tests.crosscheck.timm_models import Weights, assert_equal_outputs, divided, renamed, timm_model, weights_of

pytestmark = pytest.mark.crosscheck


def with_zero_biases(weights: Weights) -> Weights:
    """The weights, and zeros for the biases of queries, keys and values that timm does without."""
    zeros = {
        f"{name}_bias": np.zeros(array.shape[0]) for name, array in weights.items() if re.search(r"mixer\.[qkv]$", name)
    }
    return {**weights, **zeros}


def test_tnt_equals_timm():
    """With the weights of timm's tnt_s_patch16_224, zoo/tnt gives its logits."""
    model = timm_model("tnt_s_patch16_224")
    rules = [
        (r"^cls_token$", "merge.class_token"),
        (r"^patch_pos$", "position.table"),
        (r"^pixel_pos$", "stem.word_position"),
        (r"^pixel_embed\.proj\.weight", "stem.conv0"),
        (r"^pixel_embed\.proj\.bias", "stem.conv0_bias"),
        (r"^norm1_proj\.", "merge.norm_words."),
        (r"^norm2_proj\.", "merge.norm."),
        (r"^proj\.weight", "merge.weight"),
        (r"^proj\.bias", "merge.weight_bias"),
        (r"^blocks\.", "layers."),
        (r"\.norm_in\.", ".words.norm_mixer."),
        (r"\.norm_mlp_in\.", ".words.norm_channel."),
        (r"\.attn_in\.", ".words.mixer."),
        (r"\.mlp_in\.", ".words.channel_mixer."),
        (r"\.norm1_proj\.", ".merge.norm_words."),
        (r"\.norm2_proj\.", ".merge.norm."),
        (r"^(layers\.\d+)\.proj\.weight", r"\1.merge.weight"),
        (r"\.norm_out\.", ".norm_mixer."),
        (r"\.norm_mlp\.", ".norm_channel."),
        (r"\.attn_out\.", ".mixer."),
        (r"\.mlp\.", ".channel_mixer."),
        (r"\.mixer\.([qkv])\.weight", r".mixer.\1"),
        (r"\.mixer\.proj\.weight", ".mixer.out"),
        (r"\.mixer\.proj\.bias", ".mixer.out_bias"),
        (r"\.fc1\.weight", ".up"),
        (r"\.fc1\.bias", ".up_bias"),
        (r"\.fc2\.weight", ".down"),
        (r"\.fc2\.bias", ".down_bias"),
        (r"(norm\w*)\.weight$", r"\1.scale"),
        (r"^head\.weight", "head.weight"),
        (r"^head\.bias", "head.weight_bias"),
    ]
    weights = divided(weights_of(model), ".qk.", lambda outputs: {".q.": outputs // 2, ".k.": outputs // 2})
    positions = weights["pixel_pos"]  # channels before the 4x4 words, and a leading axis
    weights["pixel_pos"] = positions.reshape(positions.shape[1], -1)
    weights["patch_pos"] = weights["patch_pos"][0].T
    assert_equal_outputs(load_space("zoo/tnt"), model, with_zero_biases(renamed(weights, rules)))
