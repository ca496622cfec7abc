"""SHViT-S1 against timm."""

import pytest

from searchspaces.space import load_space
from tests.crosscheck.timm_models import (
    BATCH_NORM,
    assert_equal_outputs,
    divided,
    first_layers,
    renamed,
    timm_model,
    weights_of,
)

pytestmark = pytest.mark.crosscheck
KEY_DIM = 16
SANDWICH = [
    (r"\.downsample\.0\.m", ".before_depthwise"),
    (r"\.downsample\.1\.m\.pw1", ".before_up"),
    (r"\.downsample\.1\.m\.pw2", ".before_down"),
    (r"\.downsample\.2\.conv1", ".in"),
    (r"\.downsample\.2\.conv2", ".depthwise"),
    (r"\.downsample\.2\.conv3", ".out"),
    (r"\.downsample\.2\.se\.fc1\.weight", ".squeeze"),
    (r"\.downsample\.2\.se\.fc1\.bias", ".squeeze_bias"),
    (r"\.downsample\.2\.se\.fc2\.weight", ".excite"),
    (r"\.downsample\.2\.se\.fc2\.bias", ".excite_bias"),
    (r"\.downsample\.3\.m", ".after_depthwise"),
    (r"\.downsample\.4\.m\.pw1", ".after_up"),
    (r"\.downsample\.4\.m\.pw2", ".after_down"),
]


def test_shvit_equals_timm():
    """With the weights of timm's shvit_s1, zoo/shvit gives its logits."""
    model = timm_model("shvit_s1")
    space = load_space("zoo/shvit")
    first = first_layers(space)

    def attending(outputs: int) -> dict[str, int]:
        return {".q.": KEY_DIM, ".k.": KEY_DIM, ".v.": outputs - 2 * KEY_DIM}

    def layer(stage: str, block: str, *, second: bool) -> str:
        pairs = int(stage) > 0  # blocks of two layers; those of the first stage have no attention
        return f"layers.{first[int(stage)] + (2 * int(block) + second if pairs else int(block))}"

    rules = [
        *((rf"^patch_embed\.{2 * index}\.", f"stem.conv{index}.") for index in range(4)),
        (r"^(stem)\.conv(\d)\.bn\.", r"\1.norm\2_norm."),
        (r"^stages\.(\d)\.blocks\.(\d)\.conv\.m", lambda found: f"{layer(*found.groups(), second=False)}.mixer.kernel"),
        (r"^stages\.(\d)\.blocks\.(\d)", lambda found: layer(*found.groups(), second=True)),
        (r"\.mixer\.kernel\.bn", ".mixer._norm"),
        (r"\.mixer\.m\.pre_norm\.weight", ".mixer.norm.scale"),
        (r"\.mixer\.m\.pre_norm\.bias", ".mixer.norm.bias"),
        (r"\.mixer\.m\.proj\.1", ".mixer.out"),
        (r"\.mixer\.m\.", ".mixer."),
        (r"\.ffn\.m\.pw1", ".channel_mixer.up"),
        (r"\.ffn\.m\.pw2", ".channel_mixer.down"),
        *SANDWICH,
        (r"^stages\.(\d)", r"transitions.\1"),
        (r"^head\.bn\.", "head._norm."),
        (r"^head\.l\.weight", "head.weight"),
        (r"^head\.l\.bias", "head.weight_bias"),
        (r"\.c\.weight$", ""),
        (r"\.bn\.", "_norm."),
        *BATCH_NORM,
        (r"\._norm_", ".norm_"),
        (r"(norm\d)_norm_", r"\1_"),
    ]
    weights = divided(weights_of(model), ".qkv.", attending)
    assert_equal_outputs(space, model, renamed(weights, rules))
