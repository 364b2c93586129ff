"""The embedded emoji: content, and a held-out split of new compositions of known parts."""

import collections
import io
import pathlib
import pickle
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import imagen_jax
from imagen_jax.data.sources.emoji import EmojiSource
from tools import build_emoji

DIRECTORY = pathlib.Path(imagen_jax.__file__).parent / "assets" / "emoji"
TONE = r"(light|medium-light|medium|medium-dark|dark) skin tone"
TONES = ("yellow", "light", "medium-light", "medium", "medium-dark", "dark")


@pytest.fixture(scope="module")
def items():
    source = EmojiSource()
    return [source[i] for i in range(len(source))]


@pytest.fixture(scope="module")
def thumbs(items):
    return build_emoji.thumbnails([item.image for item in items])


def subject_and_tone(caption):
    """Splits "man with dark skin tone and red hair" into ("man with red hair", "dark").

    A caption that names no tone is yellow.
    """
    tone = re.search(TONE, caption)
    subject = re.sub(f" with {TONE}$", "", re.sub(f"{TONE} and ", "", caption))
    return subject, tone[1] if tone else "yellow"


def families(items, split=None):
    """Subject -> tone -> index of the items of a split, or of both."""
    result = collections.defaultdict(dict)
    for i, item in enumerate(items):
        if split in (None, item.split):
            subject, tone = subject_and_tone(item.captions[0])
            result[subject][tone] = i
    return result


def words(items, split):
    return {
        w
        for item in items
        if item.split == split
        for c in item.captions
        for w in re.findall(r"[\w']+", c.lower())
    }


def test_content(items):
    """Catches lost or duplicate items, file names without a label, text outside ASCII."""
    assert collections.Counter(item.split for item in items) == {"train": 3065, "heldout": 326}
    assert len({item.id for item in items}) == 3391
    assert all(
        len(item.captions) == 2 and all(c and c.isascii() for c in item.captions) for item in items
    )
    captions = {item.id: item.captions for item in items}
    assert captions["1f469-1f3fe-200d-1f692"] == [
        "woman firefighter with medium-dark skin tone",
        "woman firefighter: medium-dark skin tone, fire, firetruck",
    ]
    assert captions["34-fe0f-20e3"][0] == captions["0034-fe0f-20e3"][0] == "keycap 4"
    assert captions["1f3f4-e0067_e0062_e0073_e0063_e0074"][0] == "flag of Scotland"


def test_images_decode_on_white(items):
    """Catches broken bytes, a lost crop (four originals are 256x264), black transparency."""
    corners = []
    for item in items:
        image = Image.open(io.BytesIO(item.image))
        assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (256, 256))
        corners.append(np.asarray(image)[:4, :4].mean())
    assert np.median(corners) >= 254


def test_named_tones_are_shown(items, thumbs):
    """Catches captions from the archive's file names, most of which swap two of the tones."""
    checked = 0
    for subject, tones in families(items).items():
        if len(tones) < 6:
            continue
        light, medium, medium_dark, dark = thumbs[[tones[t] for t in TONES[2:]]].mean(-1)
        for paler, darker in ((light, medium), (medium, medium_dark), (medium_dark, dark)):
            differ = np.abs(paler - darker) > 12
            if differ.sum() > 3:
                assert (paler - darker)[differ].mean() > 0, subject
                checked += 1
    assert checked > 850


def test_heldout_words_are_known(items):
    """Catches a held-out caption with a word, keywords included, that no training caption has."""
    assert words(items, "heldout") <= words(items, "train")


def test_heldout_parts_are_known(items):
    """Catches a subject or tone that is never trained.

    One gender of a role may be missing if its other genders are trained.
    """
    train, heldout = families(items, "train"), families(items, "heldout")
    whole = [s for s, tones in heldout.items() if len(tones) == 6]
    assert len(whole) == 12
    for subject in whole:
        assert subject not in train
        role = re.sub(r"^(wo)?man\b ?", "", subject)
        others = [t for t in (role, f"man {role}", f"woman {role}", f"person {role}") if t in train]
        assert len({tone for t in others for tone in train[t]}) >= 4, subject
    alone = {s: tones for s, tones in heldout.items() if len(tones) == 1 and s in train}
    assert all(len(train[s]) == 5 for s in alone)
    spread = collections.Counter(tone for tones in alone.values() for tone in tones)
    assert sum(spread.values()) == 220 and min(spread[t] for t in TONES) >= 25, spread


def test_no_near_identical_picture_on_both_sides(items, thumbs):
    """Catches a held-out picture with a twin in training: a copy, or the unisex version."""
    held = np.array([item.split == "heldout" for item in items])
    assert not build_emoji.near_identical(thumbs[held], thumbs[~held]).any()


def test_near_identity_tells_tones_apart(items, thumbs):
    """Catches a measure under which tones collide, or re-encoded and shifted copies pass."""
    at = {item.id: i for i, item in enumerate(items)}
    pair = lambda a, b: build_emoji.near_identical(thumbs[[at[a]]], thumbs[[at[b]]]).item()
    assert (
        pair("1f431", "1f63a")
        and pair("34-fe0f-20e3", "0034-fe0f-20e3")
        and pair("00a9-fe0f", "a9-fe0f")
    )
    hands = [f"1f44b-1f3f{c}" for c in "bcdef"]
    assert not any(pair(a, b) for a in hands for b in hands if a != b)


def test_near_identity_measures():
    """Catches a difference that is summed or of one channel, and a hash of the mean."""
    a = np.random.default_rng(0).uniform(50, 200, (1, 32, 32, 3)).astype(np.float32)
    assert (
        build_emoji.near_identical(a, a + 2.4).item()
        and build_emoji.near_identical(a, a + 4.9).item()
    )
    assert not build_emoji.near_identical(a, a + 5.1).item()
    assert (build_emoji.perceptual_hash(a) == build_emoji.perceptual_hash(a + 30)).all()
    assert build_emoji.perceptual_hash(a).shape == (1, 189)


def test_reads_as_a_tfds_directory(items):
    """Catches metadata that does not fit the shards."""
    builder = tfds.builder_from_directory(str(DIRECTORY))
    row = builder.as_data_source("heldout")[0]
    first = next(item for item in items if item.split == "heldout")
    assert row["image"].shape == (256, 256, 3) and row["image"].dtype == np.uint8
    assert (
        row["id"].decode() == first.id and [c.decode() for c in row["captions"]] == first.captions
    )


def test_source(items):
    """Catches an index that wraps or overruns, swapped splits, a source that cannot be pickled."""
    source = pickle.loads(pickle.dumps(EmojiSource()))
    assert source[3390] == items[3390] and [items[i].split for i in (0, 3064, 3065)] == [
        "train",
        "train",
        "heldout",
    ]
    for index in (-1, 3391):
        with pytest.raises(IndexError, match="0 to 3390"):
            source[index]
    assert source.describe() == {
        "kind": "embedded",
        "name": "emoji",
        "images": {"train": 3065, "heldout": 326},
    }


@pytest.mark.parametrize(
    "label, said",
    [
        ("flag: France", "flag of France"),
        ("woman: medium skin tone, red hair", "woman with medium skin tone and red hair"),
        ("man: dark skin tone, bald", "bald man with dark skin tone"),
        ("kiss: woman, man, light skin tone", "kiss of woman and man with light skin tone"),
        ("family: man, woman, girl, boy", "family of man, woman, girl and boy"),
        ("deaf man: dark skin tone", "deaf man with dark skin tone"),
    ],
)
def test_wording(label, said):
    """Catches a label that keeps its colon or loses a part."""
    assert build_emoji.wording(label) == said


def test_refuses_another_archive(tmp_path):
    """Catches a build from an archive with another hash."""
    other = tmp_path / "other.tgz"
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not emojibase-data"):
        build_emoji.archive(other, *build_emoji.LABELS, tmp_path)
