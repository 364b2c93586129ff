"""Several text encoders in one text."""

import pytest

from imagen_jax.text.encoder_list import FORM, parse_encoders


@pytest.mark.parametrize(
    ("text", "encoders"),
    [
        ("t5_tiny", {"": "t5_tiny"}),
        ("a/clip@layer=-2,pooling=end", {"": "a/clip@layer=-2,pooling=end"}),
        ("dir/a+b", {"": "dir/a+b"}),
        ("t5=t5_tiny", {"t5": "t5_tiny"}),
        ("t5=a/b+clip2=c@layer=-2,pooling=end", {"t5": "a/b", "clip2": "c@layer=-2,pooling=end"}),
        ("t5=a+b/c+clip=d+e", {"t5": "a+b/c", "clip": "d+e"}),
        (FORM, {"t5": "google/t5-v1_1-xxl", "clip": "DIR@layer=-2"}),
    ],
)
def test_encoders_with_their_names(text, encoders):
    """Catches a plus sign or an equals sign of a directory or a choice taken for the grammar."""
    assert list(parse_encoders(text).items()) == list(encoders.items())


def test_a_directory_is_a_directory(tmp_path, monkeypatch):
    """Catches a directory that cannot be given because of its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t5=a+clip=b").mkdir()
    assert parse_encoders("t5=a+clip=b") == {"": "t5=a+clip=b"}
    assert parse_encoders("t5=a+clip=c") == {"t5": "a", "clip": "c"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t5=a+t5=b", "the name t5 is given twice"),
        ("t5=+clip=b", "there is no encoder after t5="),
        ("t5=", "there is no encoder after t5="),
        ("t5_tiny+clip=b", "'t5_tiny' needs a name of lower-case letters and digits"),
        ("T5=a", "'T5=a' needs a name of lower-case"),
        ("t5_xxl=a+clip=b", "'t5_xxl=a' needs a name"),
        ("a/b@layer=-2+clip=b", "'a/b@layer=-2' needs a name"),
    ],
)
def test_mistakes_are_one_clear_line(text, message):
    """Catches an encoder that is lost, or stored under another name."""
    with pytest.raises(ValueError, match=message) as caught:
        parse_encoders(text)
    assert "\n" not in str(caught.value) and repr(text) in str(caught.value)
