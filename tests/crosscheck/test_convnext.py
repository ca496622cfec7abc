"""ConvNeXt-T against timm."""

import pytest

from searchspaces.space import load_space
from tests.crosscheck.timm_models import assert_equal_outputs, first_layers, renamed, timm_model, weights_of

pytestmark = pytest.mark.crosscheck


def test_convnext_equals_timm():
    """With the weights of timm's convnext_tiny, zoo/convnext gives its logits."""
    model = timm_model("convnext_tiny")
    space = load_space("zoo/convnext")
    first = first_layers(space)
    rules = [
        (r"^stem\.0\.weight", "stem.conv0"),
        (r"^stem\.0\.bias", "stem.conv0_bias"),
        (r"^stem\.1\.weight", "stem.norm0_scale"),
        (r"^stem\.1\.bias", "stem.norm0_bias"),
        (r"^stages\.(\d)\.downsample\.0\.weight", r"transitions.\1.norm_scale"),
        (r"^stages\.(\d)\.downsample\.0\.bias", r"transitions.\1.norm_bias"),
        (r"^stages\.(\d)\.downsample\.1\.weight", r"transitions.\1.kernel"),
        (r"^stages\.(\d)\.downsample\.1\.bias", r"transitions.\1.kernel_bias"),
        (r"^stages\.(\d)\.blocks\.(\d)", lambda found: f"layers.{first[int(found[1])] + int(found[2])}"),
        (r"\.gamma$", ".scale"),
        (r"\.conv_dw\.weight$", ".mixer.kernel"),
        (r"\.conv_dw\.bias$", ".mixer.kernel_bias"),
        (r"\.norm\.weight$", ".norm.scale"),
        (r"\.norm\.bias$", ".norm.bias"),
        (r"\.mlp\.fc1\.weight$", ".channel_mixer.up"),
        (r"\.mlp\.fc1\.bias$", ".channel_mixer.up_bias"),
        (r"\.mlp\.fc2\.weight$", ".channel_mixer.down"),
        (r"\.mlp\.fc2\.bias$", ".channel_mixer.down_bias"),
        (r"^head\.norm\.scale", "head.norm_scale"),
        (r"^head\.norm\.bias", "head.norm_bias"),
        (r"^head\.fc\.weight", "head.weight"),
        (r"^head\.fc\.bias", "head.weight_bias"),
    ]
    assert_equal_outputs(space, model, renamed(weights_of(model), rules))
