"""Next-ViT-S against timm."""

import pytest

from searchspaces.space import load_space
from tests.crosscheck.timm_models import BATCH_NORM, assert_equal_outputs, renamed, timm_model, weights_of

pytestmark = pytest.mark.crosscheck
FIRST_LAYERS = (0, 3, 7, 17)
"""The number of the first layer of each stage of timm; each of ours has blocks of one width only."""
TRANSITIONS = {(1, 0): 1, (2, 0): 3, (2, 5): 5, (3, 0): 7}
"""Our transitions by stage and block of timm."""


def test_next_vit_equals_timm():
    """With the weights of timm's nextvit_small, zoo/next-vit gives its logits."""
    model = timm_model("nextvit_small")

    def embedding(stage: str, block: str) -> str:
        if (stage, block) == ("0", "0"):
            return "stem.weight"
        return f"transitions.{TRANSITIONS[int(stage), int(block)]}.weight"

    rules = [
        (r"^stem\.(\d)\.conv\.weight", r"stem.conv\1"),
        (r"^stem\.(\d)\.norm\.", r"stem.conv\1_norm."),
        (r"^stages\.(\d)\.blocks\.(\d)\.patch_embed", lambda found: embedding(*found.groups())),
        (r"^(transitions\.\d)\.weight\.norm\.", r"\1._norm."),
        (r"^stem\.weight\.norm\.", "stem.weight_norm."),
        (r"^stages\.(\d)\.blocks\.(\d)", lambda found: f"layers.{FIRST_LAYERS[int(found[1])] + int(found[2])}"),
        (r"(\.weight)\.conv\.weight$", r"\1"),
        (r"^(layers\.\d+)\.norm2?\.", r"\1.norm_channel._norm."),
        (r"^(layers\.\d+)\.norm1\.", r"\1.mixer._norm."),
        (r"\.mlp\.fc1\.weight", ".channel_mixer.up"),
        (r"\.mlp\.fc1\.bias", ".channel_mixer.up_bias"),
        (r"\.mlp\.fc2\.weight", ".channel_mixer.down"),
        (r"\.mlp\.fc2\.bias", ".channel_mixer.down_bias"),
        (r"\.e_mhsa\.norm\.", ".mixer.means_norm."),
        (r"\.e_mhsa\.proj\.", ".mixer.out."),
        (r"\.e_mhsa\.", ".mixer."),
        (r"\.mixer\.([qkv]|out)\.weight", r".mixer.\1"),
        (r"\.mixer\.([qkv]|out)\.bias", r".mixer.\1_bias"),
        (r"\.projection\.conv\.weight", ".mixer.project"),
        (r"\.projection\.norm\.", ".mixer.project_norm."),
        (r"^(layers\.(6|11|16|19))\.mhca\.", r"\1.mixer.conv."),
        (r"\.mhca\.", ".mixer."),
        (r"\.group_conv3x3\.weight", ".kernel"),
        (r"(\.mixer|\.conv)\.norm\.", r"\1.kernel_norm."),
        (r"(\.mixer|\.conv)\.projection\.weight", r"\1.out"),
        (r"^norm\.", "norm._norm."),
        (r"^head\.fc\.weight", "head.weight"),
        (r"^head\.fc\.bias", "head.weight_bias"),
        *BATCH_NORM,
        (r"\._norm_", ".norm_"),
    ]
    assert_equal_outputs(load_space("zoo/next-vit"), model, renamed(weights_of(model), rules))
