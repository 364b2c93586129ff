"""The table of published text encoders."""

import pytest

from imagen_jax.text.choice import DEFAULT, Choice
from imagen_jax.text.program import parameter_shapes, weight_bytes
from imagen_jax.text.sizes import SIZES, network, short_name

# Parameters: T5 by the counts of imagen-spec section 1; BERT 109,482,240 and 335,141,888 of
# transformers' BertModel less its pooler; CLIP 63,165,952 and 123,060,480 of its CLIPTextModel, and
# the projection.
COUNTS = {
    "t5-v1_1-small": 35_332_800,
    "flan-t5-base": 109_628_544,
    "large": 341_231_104,
    "bert-base": 109_482_240 - 768 * 769,
    "bert-large": 335_141_888 - 1024 * 1025,
    "clip-b32": 63_165_952 + 512 * 512,
    "clip-l14": 123_060_480 + 768 * 768,
    # t5-small: an embedding shared with a decoder, six blocks of 3,146,752, table and norm
    "t5-small": 32_128 * 512 + 6 * 3_146_752 + 32 * 8 + 512,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    """Catches a wrong size, and a network with other parameters than the published one."""
    shapes = parameter_shapes(network(name, "float32", DEFAULT), "float32")
    assert weight_bytes(shapes) == 4 * COUNTS[name]


def test_names_on_the_hub():
    """Catches a published encoder that is not planned, and a stranger's taken for it."""
    known = {
        "google/t5-v1_1-xxl": "t5-v1_1-xxl",
        "google/flan-t5-xl": "flan-t5-xl",
        "google-t5/t5-11b": "t5-11b",
        "google-bert/bert-large-uncased": "bert-large",
        "openai/clip-vit-large-patch14": "clip-l14",
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": "clip-bigg",
    }
    assert {name: short_name(name) for name in known} == known
    for name in ("someone/t5-v1_1-xxl", "google/ul2", "xxl", "t5_tiny"):
        assert short_name(name) is None
    assert SIZES["xxl"] is SIZES["t5-v1_1-xxl"] and SIZES["clip-bigg"].activation == "gelu"


def test_features_are_chosen():
    """Catches a plan of other features than those asked for."""
    assert network("clip-l14", "bfloat16", DEFAULT).config.layer == 11
    assert network("clip-l14", "bfloat16", Choice(layer=-1)).config.layer == 12
    with pytest.raises(ValueError, match="T5 encoders have no option layer"):
        network("xxl", "bfloat16", Choice(layer=-1))
