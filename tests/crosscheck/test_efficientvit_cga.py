"""EfficientViT-M0 against timm."""

import pytest

from searchspaces.space import load_space
from tests.crosscheck.timm_models import (
    BATCH_NORM,
    Rule,
    assert_equal_outputs,
    divided,
    first_layers,
    renamed,
    timm_model,
    weights_of,
)

pytestmark = pytest.mark.crosscheck
KEY_DIM = 16
LAYERS = 3  # of a block: convolution, attention, convolution
SANDWICH = [
    (r"\.downsample\.res1\.0\.m", ".before_depthwise"),
    (r"\.downsample\.res1\.1\.m\.pw1", ".before_up"),
    (r"\.downsample\.res1\.1\.m\.pw2", ".before_down"),
    (r"\.downsample\.patchmerge\.conv1", ".in"),
    (r"\.downsample\.patchmerge\.conv2", ".depthwise"),
    (r"\.downsample\.patchmerge\.conv3", ".out"),
    (r"\.downsample\.patchmerge\.se\.fc1\.weight", ".squeeze"),
    (r"\.downsample\.patchmerge\.se\.fc1\.bias", ".squeeze_bias"),
    (r"\.downsample\.patchmerge\.se\.fc2\.weight", ".excite"),
    (r"\.downsample\.patchmerge\.se\.fc2\.bias", ".excite_bias"),
    (r"\.downsample\.res2\.0\.m", ".after_depthwise"),
    (r"\.downsample\.res2\.1\.m\.pw1", ".after_up"),
    (r"\.downsample\.res2\.1\.m\.pw2", ".after_down"),
]


def test_efficientvit_equals_timm():
    """With the weights of timm's efficientvit_m0, zoo/efficientvit-cga gives its logits."""
    model = timm_model("efficientvit_m0")
    space = load_space("zoo/efficientvit-cga")
    first = first_layers(space)

    def attending(outputs: int) -> dict[str, int]:
        return {".q.": KEY_DIM, ".k.": KEY_DIM, ".v.": outputs - 2 * KEY_DIM}

    def layer(number: int) -> Rule:
        return (
            rf"^stages\.(\d)\.blocks\.(\d)\.{('(dw0|ffn0)', '(mixer)', '(dw1|ffn1)')[number]}\.m",
            lambda found: f"layers.{first[int(found[1])] + LAYERS * int(found[2]) + number}.{found[3]}",
        )

    rules = [
        (r"^patch_embed\.conv(\d)\.conv\.", lambda found: f"stem.conv{int(found[1]) - 1}."),
        (r"^patch_embed\.conv(\d)\.bn\.", lambda found: f"stem.norm{int(found[1]) - 1}_norm."),
        (r"^(stem\.conv\d)\.weight", r"\1"),
        *(layer(number) for number in range(LAYERS)),
        (r"\.dw\d\.conv\.weight", ".mixer.kernel"),
        (r"\.dw\d\.bn", ".mixer._norm"),
        (r"\.ffn\d\.pw1", ".channel_mixer.up"),
        (r"\.ffn\d\.pw2", ".channel_mixer.down"),
        (r"\.attn\.attention_biases", ".offsets"),
        (r"\.attn\.([qkv])\.(\d)", r".\1\2"),
        (r"\.attn\.dws\.(\d)", r".q\1_depthwise"),
        (r"\.attn\.proj\.1", ".out"),
        *SANDWICH,
        (r"^stages\.(\d)", r"transitions.\1"),
        (r"^head\.bn\.", "head._norm."),
        (r"^head\.linear\.weight", "head.weight"),
        (r"^head\.linear\.bias", "head.weight_bias"),
        (r"\.conv\.weight$", ""),
        (r"\.bn\.", "_norm."),
        *BATCH_NORM,
        (r"\._norm_", ".norm_"),
        (r"(norm\d)_norm_", r"\1_"),
    ]
    weights = divided(weights_of(model), ".qkvs.", attending)
    assert_equal_outputs(space, model, renamed(weights, rules))
