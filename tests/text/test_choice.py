"""The choice of features that is given with an encoder's name."""

import pytest

from imagen_jax.text.choice import DEFAULT, Choice, check_pooling, parse, resolve_layer


def test_names_with_a_choice():
    """Catches an option that is lost, and a sign in a name, path or revision taken for one."""
    assert parse("openai/clip@layer=-2,final_norm=no,pooling=end") == (
        "openai/clip",
        Choice(-2, False, "end"),
    )
    assert parse("weights/clip@final_norm=yes") == ("weights/clip", Choice(final_norm=True))
    for name in ("t5_tiny", "google/t5-v1_1-xxl", "a@b/clip", "clip@main", "x@a=1/clip"):
        assert parse(name) == (name, DEFAULT)


def test_a_directory_is_a_directory(tmp_path):
    """Catches a directory that cannot be given because of its name."""
    directory = tmp_path / "clip@layer=3"
    directory.mkdir()
    assert parse(str(directory)) == (str(directory), DEFAULT)
    assert parse(f"{directory}@layer=2") == (str(directory), Choice(layer=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip@depth=3", "no option 'depth'; use layer, final_norm, pooling"),
        ("clip@layer=3,layer=4", "option 'layer' is given twice"),
        ("clip@layer=two", "layer is 'two'; write it as in NAME@layer=-2"),
        ("clip@layer=3,final_norm", "final_norm is ''"),
        ("clip@final_norm=True", "final_norm is 'True'"),
    ],
)
def test_mistakes_are_one_clear_line(text, message):
    """Catches a mistyped choice that is ignored: other features would be stored."""
    with pytest.raises(ValueError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value) and text in str(caught.value)


def test_layers_are_counted_from_the_embeddings():
    """Catches -1 as the penultimate layer, and a layer that wraps around."""
    assert [resolve_layer(n, 12) for n in (-1, -2, 0, 12, -13)] == [12, 11, 0, 12, 0]
    for layer in (13, -14):
        with pytest.raises(ValueError, match=rf"layer {layer}: the encoder has 12 blocks"):
            resolve_layer(layer, 12)


def test_what_a_family_lacks_is_refused():
    """Catches an option without effect, and a pooling that no network has."""
    with pytest.raises(ValueError, match="T5 encoders have no option layer or pooling: leave it"):
        Choice(layer=-1, pooling="mean").refuse(("layer", "pooling"), "T5")
    DEFAULT.refuse(("layer", "final_norm", "pooling"), "T5")
    with pytest.raises(ValueError, match="pooling 'max': choose one of cls, mean"):
        check_pooling("max", ("cls", "mean"))
