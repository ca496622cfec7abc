"""EfficientFormer-L1 against timm."""

import pytest

from searchspaces.space import load_space
from tests.crosscheck.timm_models import (
    BATCH_NORM,
    Weights,
    assert_equal_outputs,
    first_layers,
    renamed,
    timm_model,
    weights_of,
)

pytestmark = pytest.mark.crosscheck
HEADS, KEY_DIM, VALUE_DIM = 8, 32, 128


def one_classifier(weights: Weights) -> Weights:
    """The mean of the two classifiers, whose scores timm averages, in the place of the first."""
    kept = {name: array for name, array in weights.items() if not name.startswith("head_dist.")}
    halves = {
        name: (weights[name] + weights[name.replace("head.", "head_dist.")]) / 2 for name in kept if "head." in name
    }
    return {**kept, **halves}


def queries_keys_values(weights: Weights) -> Weights:
    """The joint projections, in which each head has its queries, keys and values together, as three."""
    result: Weights = {}
    for name, array in weights.items():
        if ".qkv." not in name:
            result[name] = array
            continue
        heads = array.reshape(HEADS, 2 * KEY_DIM + VALUE_DIM, *array.shape[1:])
        pieces = {"q": heads[:, :KEY_DIM], "k": heads[:, KEY_DIM : 2 * KEY_DIM], "v": heads[:, 2 * KEY_DIM :]}
        for part, piece in pieces.items():
            result[name.replace(".qkv.", f".{part}.")] = piece.reshape(-1, *array.shape[1:])
    return result


def test_efficientformer_equals_timm():
    """With the weights of timm's efficientformer_l1, zoo/efficientformer gives its logits."""
    model = timm_model("efficientformer_l1")
    space = load_space("zoo/efficientformer")
    first = first_layers(space)
    attention = first[-1] + 3

    def block(stage: str, number: str) -> str:
        behind_reshape = stage == "3" and int(number) > 3  # the module between counts as a block there
        return f"layers.{first[int(stage)] + int(number) - behind_reshape}"

    rules = [
        (r"^stem\.(conv|norm)(\d)", lambda found: f"stem.{found[1]}{int(found[2]) - 1}"),
        (r"^(stem\.norm\d)\.", r"\1_norm."),
        (r"^(stem\.conv\d)\.weight", r"\1"),
        (r"^(stem\.conv\d)\.bias", r"\1_bias"),
        (r"^stages\.(\d)\.downsample\.conv\.weight", r"transitions.\1.kernel"),
        (r"^stages\.(\d)\.downsample\.conv\.bias", r"transitions.\1.kernel_bias"),
        (r"^stages\.(\d)\.downsample\.norm\.", r"transitions.\1._norm."),
        (r"^stages\.(\d)\.blocks\.(\d)", lambda found: block(*found.groups())),
        (r"\.ls1\.gamma$", ".scale_mixer"),
        (r"\.ls2\.gamma$", ".scale_channel"),
        (rf"^layers\.{attention}\.norm1\.weight", f"layers.{attention}.norm_mixer.scale"),
        (rf"^layers\.{attention}\.norm1\.bias", f"layers.{attention}.norm_mixer.bias"),
        (rf"^layers\.{attention}\.norm2\.weight", f"layers.{attention}.norm_channel.scale"),
        (rf"^layers\.{attention}\.norm2\.bias", f"layers.{attention}.norm_channel.bias"),
        (r"\.token_mixer\.attention_biases", ".mixer.offsets"),
        (r"\.token_mixer\.proj\.", ".mixer.out."),
        (r"\.token_mixer\.", ".mixer."),
        (r"\.mlp\.(fc|norm)1", r".channel_mixer.\1up"),
        (r"\.mlp\.(fc|norm)2", r".channel_mixer.\1down"),
        (r"\.fc(up|down)", r".\1"),
        (r"\.norm(up|down)", r".\1_norm"),
        (r"\.mixer\.(\w+)\.weight", r".mixer.\1"),
        (r"\.mixer\.(\w+)\.bias", r".mixer.\1_bias"),
        (r"\.channel_mixer\.(up|down)\.weight", r".channel_mixer.\1"),
        (r"\.channel_mixer\.(up|down)\.bias", r".channel_mixer.\1_bias"),
        (r"^norm\.weight", "norm.scale"),
        (r"^head\.weight", "head.weight"),
        (r"^head\.bias", "head.weight_bias"),
        *BATCH_NORM,
        (r"\._norm_", ".norm_"),
        (r"(norm\d)_norm_", r"\1_"),
    ]
    weights = queries_keys_values(one_classifier(weights_of(model)))
    assert_equal_outputs(space, model, renamed(weights, rules))
