"""PoolFormer-S12 against timm."""

import pytest

from tests.crosscheck.timm_models import assert_equal_outputs, first_layers, renamed, timm_model, variant, weights_of

pytestmark = pytest.mark.crosscheck


def test_poolformer_equals_timm():
    """With the weights of timm's poolformer_s12, zoo/metaformer gives its logits.

    timm norms the mean of the tokens; the authors' code, and the zoo, norm the tokens before their mean.
    """
    model = timm_model("poolformer_s12")
    space = variant("zoo/metaformer", final_norm="none", head={"classifier": {"norm": "layer_norm"}})
    first = first_layers(space)
    rules = [
        (r"^stem\.conv\.weight", "stem.conv0"),
        (r"^stem\.conv\.bias", "stem.conv0_bias"),
        (r"^stages\.(\d)\.downsample\.conv\.weight", r"transitions.\1.kernel"),
        (r"^stages\.(\d)\.downsample\.conv\.bias", r"transitions.\1.kernel_bias"),
        (r"^stages\.(\d)\.blocks\.(\d)", lambda found: f"layers.{first[int(found[1])] + int(found[2])}"),
        (r"^(layers.*)\.norm1\.weight$", r"\1.norm_mixer.scale"),
        (r"^(layers.*)\.norm1\.bias$", r"\1.norm_mixer.bias"),
        (r"^(layers.*)\.norm2\.weight$", r"\1.norm_channel.scale"),
        (r"^(layers.*)\.norm2\.bias$", r"\1.norm_channel.bias"),
        (r"\.layer_scale1\.scale$", ".scale_mixer"),
        (r"\.layer_scale2\.scale$", ".scale_channel"),
        (r"\.mlp\.fc1\.weight$", ".channel_mixer.up"),
        (r"\.mlp\.fc1\.bias$", ".channel_mixer.up_bias"),
        (r"\.mlp\.fc2\.weight$", ".channel_mixer.down"),
        (r"\.mlp\.fc2\.bias$", ".channel_mixer.down_bias"),
        (r"^head\.norm\.weight", "head.norm_scale"),
        (r"^head\.norm\.bias", "head.norm_bias"),
        (r"^head\.fc\.weight", "head.weight"),
        (r"^head\.fc\.bias", "head.weight_bias"),
    ]
    assert_equal_outputs(space, model, renamed(weights_of(model), rules))
