"""The rules for text: the same for captions and prompts, by examples, and files read by lines."""

import random

import pytest

from imagen_jax import caption_text, cli
from imagen_jax.data.prepare import checks
from imagen_jax.sample import read_prompts

ASTRONAUT = "\U0001f469\u200d\U0001f680"  # woman, zero-width joiner, rocket
WALES = "\U0001f3f4\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f"
PERSIAN = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # needs its zero-width non-joiner
CASES = {
    "plain": ("a red apple", "a red apple", ""),
    "white space": (" a\tred \n apple ", "a red apple", ""),
    "mark": ("\ufeffa red apple", "a red apple", "1 x U+FEFF"),
    "mark inside": ("a red\ufeff apple", "a red apple", "1 x U+FEFF"),
    "line separators": ("a\u2028red\u2029fat\x0capple\x85pie", "a red fat apple pie", ""),
    "no-break spaces": ("a\u00a0red\u202fapple", "a red apple", ""),
    "emoji of parts": (f"{ASTRONAUT} an astronaut", f"{ASTRONAUT} an astronaut", ""),
    "emoji with selector": ("\u2764\ufe0f\u200d\U0001f525", "\u2764\ufe0f\u200d\U0001f525", ""),
    "flag of tags": (f"the flag {WALES}", f"the flag {WALES}", ""),
    "hidden tags": ("cat\U000e0064\U000e006f", "cat", "2 x U+E0064, U+E006F"),
    "script with joiners": (PERSIAN, PERSIAN, ""),
    "loose joiners": ("red\u200dapple \u200d x", "redapple x", "2 x U+200D"),
    "zero-width space": ("a red\u200b apple", "a red apple", "1 x U+200B"),
    "soft hyphen": ("extra\u00adordinary", "extraordinary", "1 x U+00AD"),
    "direction": ("\u202ea red apple\u202c", "a red apple", "2 x U+202C, U+202E"),
    "control": ("a\x00 red\x07 \x9fapple", "a red apple", "3 x U+0000, U+0007, U+009F"),
    "many kinds": ("\x01\x02\x03\x04\x05\x06x", "x", "6 x " + ", ".join(
        f"U+000{i}" for i in range(1, 6)) + ", ..."),
    "new emoji": ("\U0001fae9 tired", "\U0001fae9 tired", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_caption_and_a_prompt_are_the_same_text(name, tmp_path):
    """Catches other rules in prepare_data than in sample, and emoji or scripts that are damaged."""
    text, expected, note = CASES[name]
    assert caption_text.clean(text) == (expected, note)
    captions, notes, bad = checks.usable_captions([text])
    assert (captions, notes, bad) == ([expected], [note] if note else [], [])
    assert cli.check_prompts([text]) == read_prompts([text], "") == [expected]
    file = tmp_path / "prompts.txt"
    if not set(text) & set("\n\r"):
        file.write_text(f"{text}\n", encoding="utf-8")
        assert read_prompts([], str(file)) == [expected]


def test_cleaning_twice_changes_nothing():
    """Catches a rule that makes room for another: a joiner that is loose once a space is gone."""
    pieces = ["a", " ", "\u0301", "\u3000", PERSIAN, ASTRONAUT, WALES, "\U0001f3f4", "\U000e007f"]
    pieces += [*"\u200b\u200c\u200d\ufeff\u00ad\u2028\x00\x85\u2060\u00a0\ufe0f"]
    rng = random.Random(0)
    for _ in range(3000):
        cleaned, _ = caption_text.clean("".join(rng.choices(pieces, k=8)))
        assert caption_text.clean(cleaned) == (cleaned, "")


@pytest.mark.parametrize("text", ["", " ", "\ufeff", "\u200b\u200d", "\x00", "\u3164"])
def test_text_that_shows_nothing_is_empty(text):
    """Catches a picture drawn, or a caption trained on, from characters that nobody can see."""
    assert checks.usable_captions([text]) == ([], [], ["empty_caption"])
    with pytest.raises(ValueError, match="is empty"):
        cli.check_prompts([text])


def test_text_that_is_not_unicode():
    """Catches a lone surrogate that ends in a traceback when it is encoded."""
    assert checks.usable_captions(["bad \ud83d"]) == ([], [], ["invalid_caption"])
    with pytest.raises(ValueError, match="is not valid Unicode"):
        cli.check_prompts(["bad \ud83d"])


def test_a_prompt_that_python_left_undecoded():
    """Catches a UTF-8 prompt on the command line that is refused in an ASCII locale."""
    undecoded = "a red \U0001f34e".encode().decode("ascii", "surrogateescape")
    assert cli.check_prompts([undecoded]) == ["a red \U0001f34e"]


def test_removed_characters_of_a_prompt_are_a_warning(caplog):
    """Catches a prompt that is changed without a word, and a warning for white space."""
    cli.check_prompts(["a  red\u00a0apple", "a green\u200b apple"])
    assert [record.getMessage() for record in caplog.records] == [
        "removed 1 x U+200B from the prompt 'a green apple'"
    ]


def test_a_prompts_file(tmp_path):
    """Catches a mark in the first prompt, a prompt cut at U+2028, blank lines that are drawn."""
    file = tmp_path / "prompts.txt"
    text = "\ufeffa red apple\r\n\r\n \u200b\na green\u2028apple\x0c\ra pear"
    file.write_bytes(text.encode())
    assert read_prompts(["mine"], str(file)) == ["mine", "a red apple", "a green apple", "a pear"]
    file.write_bytes(b"a red apple\nthe painter\x92s apple\n")
    with pytest.raises(ValueError, match=r"prompts.txt:2 is not UTF-8 text \(byte 0x92\)"):
        read_prompts([], str(file))
    file.write_bytes("a red apple".encode("utf-16"))
    with pytest.raises(ValueError, match="is UTF-16 text: save it as UTF-8"):
        read_prompts([], str(file))
    with pytest.raises(ValueError, match="--prompts gs://bucket/p.txt is a URL, only local paths"):
        read_prompts([], "gs://bucket/p.txt")


def test_lines_end_at_line_ends_alone():
    """Catches `splitlines`, which also cuts at form feeds, U+0085 and U+2028."""
    text = "a\nb\r\nc\rd\x0be\x0cf\x1cg\x85h\u2028i\u2029j\n\nk\n"
    assert list(caption_text.lines(text)) == [
        "a", "b", "c", "d\x0be\x0cf\x1cg\x85h\u2028i\u2029j", "", "k"
    ]  # fmt: skip
    assert list(caption_text.lines("")) == []
