"""The text encoder that ships with the package: its files, its tokenizer, and what its features
know.

The full measurement, against its teacher, is tools/evaluate_text_encoder.py; these are small
versions that need no archive.
"""

import functools
import itertools
import json
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from imagen_jax.data.sources.emoji import EmojiSource
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.t5_network import T5Config, T5Encoder
from imagen_jax.weights.t5_files import load_tokenizer, save_encoder
from imagen_jax.weights.text_encoders import find_encoder, load_text_encoder

DIRECTORY = find_encoder("t5_tiny")
COLOURS = "red orange yellow green blue purple brown black white".split()
NOUNS = (
    "car dog cat bird horse train boat bicycle kite ball umbrella chair table bench clock vase"
    " bottle cup bowl apple banana hat shoe tree".split()
)
TEST_NOUNS = "flower fish turtle rabbit bear cow sheep elephant star heart flag balloon".split()
PARAPHRASES = [
    (
        "A brown dog leaps to catch a frisbee in the park.",
        "A frisbee is about to be caught by a jumping dog on the grass.",
    ),
    ("A man rides a wave on his surfboard.", "Surfer balancing on a big wave in the ocean."),
    (
        "Two zebras graze in a dry field.",
        "A pair of striped animals are eating grass on the plain.",
    ),
    (
        "A plate with a slice of pepperoni pizza.",
        "Pizza with sausage and cheese served on a white dish.",
    ),
    (
        "A red double decker bus drives down a city street.",
        "Tall bus in traffic between buildings in London.",
    ),
    ("A cat sleeps on a laptop keyboard.", "Kitten curled up on top of an open computer."),
    ("A woman holds an umbrella in the rain.", "Lady walking on a wet sidewalk under an umbrella."),
    ("A group of children play soccer.", "Kids kicking a ball on a field."),
    (
        "A bathroom with a sink, a mirror and a toilet.",
        "View of a small restroom with white toilet and washbasin.",
    ),
    (
        "A giraffe stretches its neck to reach leaves of a tree.",
        "Tall giraffe eating from the top of the branches.",
    ),
    ("An airplane takes off from the runway.", "A large passenger jet leaving the airport."),
    (
        "A baseball player swings his bat.",
        "The batter hits the ball in front of the catcher and the umpire.",
    ),
    ("A train stops at the station.", "Passengers wait on the platform next to a locomotive."),
    ("A vase of flowers stands on a table.", "Bouquet of roses in a glass jar."),
    ("A skier goes down a snowy slope.", "Person on skis moving fast over snow on the mountain."),
    ("A clock on a tall tower.", "Steeple with the time shown on its face."),
    ("A bowl of apples, oranges and bananas.", "Fresh fruit in a basket on the counter."),
    ("An elephant sprays itself with water.", "Big gray animal with its trunk bathing in a river."),
    ("A boy brushes his teeth.", "Young child with a toothbrush in his mouth."),
    ("A motorcycle is parked at the curb.", "Motorbike standing on the side of the road."),
]


@functools.cache
def embedded() -> TextEncoder:
    return load_text_encoder("t5_tiny", max_length=64, dtype="float32")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> TextEncoder:
    """The same tokenizer and shapes with random weights: the control of every measurement."""
    config = T5Config.from_json(DIRECTORY / "config.json")
    params = T5Encoder(config, jnp.float32).init(
        jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    )["params"]
    directory = tmp_path_factory.mktemp("encoders") / "untrained"
    save_encoder(directory, config, params, load_tokenizer(DIRECTORY)[0], "float32")
    return load_text_encoder(str(directory), max_length=64, dtype="float32")


@functools.cache
def emoji_captions() -> list[str]:
    source = EmojiSource()
    return sorted({caption for i in range(len(source)) for caption in source[i].captions})


def means(encoder: TextEncoder, texts: list[str]) -> np.ndarray:
    """Unit mean token features [n, d]."""
    pooled = np.stack([f.astype(np.float32).mean(0) for f in encoder.encode(texts, 256)])
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def test_files_are_small_and_bfloat16():
    """Catches fp32 weights or a left-over decoder in the package: the directory must stay under 12
    MB.
    """
    assert sum(path.stat().st_size for path in pathlib.Path(DIRECTORY).iterdir()) < 12e6
    with safetensors.safe_open(DIRECTORY / "model.safetensors", framework="numpy") as weights:
        slices = [weights.get_slice(name) for name in weights.keys()]
        assert {s.get_dtype() for s in slices} == {"BF16"}
        assert sum(np.prod(s.get_shape()) for s in slices) == 4_360_064
    notice = (DIRECTORY / "NOTICE").read_text()
    assert all(name in notice for name in ("MiniLM", "COCO", "WordNet", "emojibase"))


def test_config_is_readable_by_others():
    """Catches a config that only our loader understands: the keys transformers needs for a T5 v1.1
    encoder.
    """
    config = json.loads((DIRECTORY / "config.json").read_text())
    wanted = {
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "architectures": ["T5EncoderModel"],
    }
    assert {k: config[k] for k in wanted} == wanted


def test_tokenizer_ids_are_fixed():
    """Catches a tokenizer that was exchanged, keeps case or accents, adds a first token or forgets
    the last one.
    """
    ids, truncated = embedded().tokenize(["A Red car", "a red car", "café", "cafe", "", "漢"])
    assert ids[0] == ids[1] == [3, 48, 141, 1]
    assert ids[2] == ids[3]
    assert ids[4] == [1] and 2 in ids[5]
    assert not any(truncated)


def test_every_emoji_caption_is_known_and_short():
    """Catches a vocabulary learnt from other texts: no unknown token, and the demo's 32 tokens hold
    nearly every caption.
    """
    ids, _ = embedded().tokenize(emoji_captions())
    assert not any(2 in row for row in ids)
    assert np.mean([len(row) <= 32 for row in ids]) > 0.99


def test_features_are_of_unit_size():
    """Catches an output scale that a LayerNorm-free consumer could not take, and non-finite
    features.
    """
    features = np.concatenate(
        [f.astype(np.float32) for f in embedded().encode(emoji_captions()[::20], 128)]
    )
    assert np.isfinite(features).all()
    assert 0.3 < np.sqrt(np.mean(features**2)) < 3


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_emoji_captions_are_all_different(every):
    """Catches an encoder that ignores a word which tells two emoji apart."""
    vectors = means(embedded(), emoji_captions()[::every])
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    assert similarity.max() < 1 - 1e-6


def test_a_paraphrase_is_the_nearest(untrained):
    """Catches weights that were shuffled, wrongly transposed or never trained."""
    first, second = zip(*PARAPHRASES, strict=True)

    def recall(encoder):
        return np.mean(
            np.argmax(means(encoder, list(first)) @ means(encoder, list(second)).T, 1)
            == np.arange(len(first))
        )

    assert recall(embedded()) >= 0.85
    assert recall(untrained) <= 0.6


def colour_sentences(nouns: list[str], count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Sentences of two coloured nouns, and the two colours' indices [count, 2]."""
    rng = random.Random(seed)
    drawn = [(rng.sample(nouns, 2), rng.sample(range(len(COLOURS)), 2)) for _ in range(count)]
    texts = [f"a {COLOURS[i]} {n} and a {COLOURS[j]} {m}" for (n, m), (i, j) in drawn]
    return texts, np.array([colours for _, colours in drawn])


def noun_features(encoder: TextEncoder, texts: list[str]) -> np.ndarray:
    """Features at the two nouns, each one token here: positions 2 and -2 [2 n, d]."""
    rows = [(f[2].astype(np.float32), f[-2].astype(np.float32)) for f in encoder.encode(texts, 256)]
    return np.stack(list(itertools.chain(*rows)))


def probe_accuracy(encoder: TextEncoder) -> float:
    """Ridge regression from a noun's features to its own colour, tested on nouns it was not fitted
    on.
    """
    (train_texts, train_colours), (test_texts, test_colours) = (
        colour_sentences(NOUNS, 600, 0),
        colour_sentences(TEST_NOUNS, 200, 1),
    )
    x, z = noun_features(encoder, train_texts), noun_features(encoder, test_texts)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, z = (x - mean) / scale, (z - mean) / scale
    targets = np.eye(len(COLOURS))[train_colours.ravel()] - 1 / len(COLOURS)
    weights = np.linalg.solve(x.T @ x + 100 * np.eye(x.shape[1]), x.T @ targets)
    return float(np.mean(np.argmax(z @ weights, 1) == test_colours.ravel()))


def test_a_noun_knows_its_own_colour(untrained):
    """Catches features of a bag of words: which of the sentence's two colours is a noun's own must
    be in its token (1/2 by luck).
    """
    assert probe_accuracy(embedded()) > 0.9
    assert probe_accuracy(untrained) < 0.6
