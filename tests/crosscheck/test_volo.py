"""VOLO-D1 against timm."""

import numpy as np
import pytest

from searchspaces.space import load_space
from tests.crosscheck.timm_models import (
    BATCH_NORM,
    assert_equal_outputs,
    divided,
    renamed,
    timm_model,
    weights_of,
)

pytestmark = pytest.mark.crosscheck
FIRST = {"0": 0, "2": 4, "3": 8, "4": 16}
"""Number of the first layer of each group of timm's `network`."""


def test_volo_equals_timm():
    """With the weights of timm's volo_d1_224, zoo/volo-outlook-attention gives its logits.

    The biases of queries, keys and values, which timm's transformer lacks, are zero.
    """
    model = timm_model("volo_d1_224")
    space = load_space("zoo/volo-outlook-attention")
    weights = divided(weights_of(model), ".qkv.", lambda size: {f".{name}.": size // 3 for name in "qkv"})
    weights = divided(weights, ".kv.", lambda size: {f".{name}.": size // 2 for name in "kv"})
    weights["pos_embed"], weights["cls_token"] = weights["pos_embed"][0], np.ravel(weights["cls_token"])
    rules = [
        (r"^pos_embed", "transitions.1.position"),
        (r"^cls_token", "head.class_token"),
        (r"^patch_embed\.conv\.(0|3|6)\.weight", lambda found: f"stem.conv{int(found[1]) // 3}"),
        (r"^patch_embed\.conv\.(1|4|7)\.", lambda found: f"stem.conv{int(found[1]) // 3}_norm."),
        *BATCH_NORM,
        (r"^patch_embed\.proj\.weight", "stem.patches"),
        (r"^patch_embed\.proj\.bias", "stem.patches_bias"),
        (r"^network\.1\.proj\.weight", "transitions.1.kernel"),
        (r"^network\.1\.proj\.bias", "transitions.1.kernel_bias"),
        (r"^network\.(0|2|3|4)\.(\d)", lambda found: f"layers.{FIRST[found[1]] + int(found[2])}"),
        (r"^post_network", "head.layers"),
        (r"^(head\.layers\.\d)\.(?:attn|mlp)", r"\1"),
        (r"^(head\.layers\.\d)\.norm1\.", r"\1.norm_mixer_"),
        (r"^(head\.layers\.\d)\.norm2\.", r"\1.norm_channel_"),
        (r"\.norm1\.", ".norm_mixer."),
        (r"\.norm2\.", ".norm_channel."),
        (r"^(layers\.\d+)\.attn\.", r"\1.mixer."),
        (r"^(layers\.\d+)\.mlp\.", r"\1.channel_mixer."),
        (r"(norm_mixer|norm_channel)([._])weight$", r"\1\2scale"),
        (r"\.attn\.weight$", ".weights"),
        (r"\.attn\.bias$", ".weights_bias"),
        (r"\.fc1\.", ".up."),
        (r"\.fc2\.", ".down."),
        (r"\.proj\.", ".out."),
        (r"\.(q|k|v|up|down|out)\.weight$", r".\1"),
        (r"\.(up|down|out)\.bias$", r".\1_bias"),
        (r"^norm\.weight", "head.norm_scale"),
        (r"^norm\.bias", "head.norm_bias"),
        (r"^aux_head\.weight", "head.dense"),
        (r"^aux_head\.bias", "head.dense_bias"),
        (r"^head\.bias", "head.weight_bias"),
    ]
    found = renamed(weights, rules)
    for layer in range(4, 18):
        found.update({f"layers.{layer}.mixer.{name}_bias": np.zeros(384) for name in "qkv"})
    assert_equal_outputs(space, model, found)
