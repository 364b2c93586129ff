"""The training texts of the embedded text encoder, read from four published archives.

The archives, each checked by its SHA-256: COCO 2014 captions (the scorer jar in the pycocoevalcap
wheel has both annotation files), WordNet 3.0 glosses (Debian's wordnet-base), and emoji labels and
keywords (emojibase-data). Composed phrases, in which every noun has its own colour, are added.
"""

import hashlib
import io
import json
import pathlib
import random
import re
import subprocess
import tarfile
import tempfile
import unicodedata
import zipfile

SHA256 = {
    "pycocoevalcap": "083ed7910f1aec000b0a237ef6665f74edf19954204d0b1cbdb8399ed132228d",
    "wordnet": "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    "emojibase": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "minilm": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}
# by image: the first half is the test set, the second half is for choosing between trainings
HELDOUT_IMAGES = 2000
# captions for which the teacher's states are computed; the others only serve as second captions of
# an image
COCO_TAUGHT = 60_000
GLOSSES = 12_000
PHRASES = 20_000
CONCRETE = {
    5,
    6,
    8,
    13,
    15,
    17,
    18,
    19,
    20,
    27,
}  # WordNet lexicographer files: animal, artifact, body, food, location, object, person, ...

COLOURS = "red orange yellow green blue purple pink brown black white gray golden".split()
NOUNS = (
    "car dog cat bird horse bus train boat bicycle truck airplane kite ball umbrella chair table"
    " bed sofa bench clock vase bottle cup bowl plate fork spoon knife cake apple banana carrot"
    " pizza sandwich book phone laptop keyboard lamp shirt hat tie shoe jacket dress bag suitcase"
    " flower tree leaf fish turtle rabbit bear cow sheep elephant giraffe zebra butterfly heart"
    " star circle square triangle flag balloon gift house door window bridge tower rocket robot"
    " ghost crown key bell candle drum guitar violin camera pencil scissors box basket bucket"
    " mushroom cherry grapes lemon pepper egg cheese donut frog snake whale octopus crab snail bee"
    " spider monkey fox wolf lion tiger panda pig"
).split()
PEOPLE = (
    "man woman person boy girl child baby cook pilot farmer teacher doctor nurse artist scientist"
    " singer judge firefighter mechanic student astronaut"
).split()
TONES = ["light", "medium light", "medium", "medium dark", "dark"]
CLOTHES = "hat shirt dress jacket tie coat scarf helmet".split()
PREPOSITIONS = [
    "next to",
    "on top of",
    "under",
    "behind",
    "in front of",
    "to the left of",
    "to the right of",
    "above",
    "below",
    "inside",
]
SIZES = "small big tiny huge round square tall old shiny wooden".split()


def checked(path: str, name: str) -> bytes:
    """The archive's bytes; ValueError if they are not the ones the encoder was trained on."""
    content = pathlib.Path(path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
        raise ValueError(
            f"{path} has SHA-256 {digest}, but the {name} archive should have {SHA256[name]}: fetch"
            " the version named in the docstring"
        )
    return content


def normalise(text: str) -> str:
    """Lower case, no accents, single spaces: the form in which captions are compared."""
    letters = (c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    return " ".join("".join(letters).lower().split())


def words(text: str) -> list[str]:
    """Words and punctuation marks of a text, the unit of comparison with the teacher."""
    return re.findall(r"[^\W_]+|[^\w\s]|_", normalise(text))


def coco_captions(wheel: str) -> dict[int, list[str]]:
    """Image id -> its captions (about five each), for all 123,287 images of COCO 2014."""
    with zipfile.ZipFile(io.BytesIO(checked(wheel, "pycocoevalcap"))) as outer:
        jar = outer.read("pycocoevalcap/spice/spice-1.0.jar")
    captions = {}
    with zipfile.ZipFile(io.BytesIO(jar)) as inner:
        for part in ("train", "val"):
            for row in json.loads(inner.read(f"coco/annotations/captions_{part}2014.json"))[
                "annotations"
            ]:
                captions.setdefault(row["image_id"], []).append(" ".join(row["caption"].split()))
    return captions


def split_images(
    captions: dict[int, list[str]], seed: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """Image ids (train, test, dev); test and dev have HELDOUT_IMAGES / 2 each."""
    ids = sorted(captions)
    random.Random(seed).shuffle(ids)
    half = HELDOUT_IMAGES // 2
    return ids[HELDOUT_IMAGES:], ids[:half], ids[half:HELDOUT_IMAGES]


def training_captions(captions: dict[int, list[str]]) -> dict[int, list[str]]:
    """Captions of the training images, less those that a held-out image has word for word."""
    train, test, dev = split_images(captions)
    forbidden = {normalise(c).rstrip(". ") for i in test + dev for c in captions[i]}
    kept = {
        i: [c for c in captions[i] if normalise(c).rstrip(". ") not in forbidden] for i in train
    }
    return {i: texts for i, texts in kept.items() if texts}


def wordnet_glosses(package: str) -> list[str]:
    """'name, other name: definition' of nouns for things one can see, and of adjectives."""
    checked(package, "wordnet")
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        for part in ("noun", "adj"):
            for line in (
                (pathlib.Path(folder) / f"usr/share/wordnet/data.{part}").read_text().splitlines()
            ):
                if line.startswith("  "):  # the licence
                    continue
                fields, gloss = line.split(" | ", 1)
                fields = fields.split()
                if part == "noun" and int(fields[1]) not in CONCRETE:
                    continue
                names = [
                    re.sub(r"\(\w+\)", "", fields[4 + 2 * i]).replace("_", " ")
                    for i in range(min(2, int(fields[3], 16)))
                ]
                definition = re.sub(r"\([^)]*\)", "", gloss.split(";")[0]).split()
                texts.append(f"{', '.join(names)}: {' '.join(definition[:12])}")
    return texts


def emoji_entries(package: str) -> list[tuple[str, list[str]]]:
    """(label, keywords) of every emoji, skin-tone variants included."""
    with tarfile.open(fileobj=io.BytesIO(checked(package, "emojibase"))) as archive:
        data = json.load(archive.extractfile("package/en/data.json"))
    entries = []
    for row in data:
        for variant in [row, *row.get("skins", [])]:
            entries.append((variant["label"], row.get("tags", [])))
    return entries


def emoji_texts(entries: list[tuple[str, list[str]]], rng: random.Random) -> list[str]:
    """Each label alone, in a sentence, and with its keywords."""
    texts = []
    for label, tags in entries:
        some = rng.sample(tags, min(4, len(tags)))
        texts += [label, f"{label}, {', '.join(some)}" if some else label]
        texts.append(
            rng.choice(
                ["an emoji of {}", "a picture of {}", "{} icon", "a 3d rendering of {}"]
            ).format(label)
        )
    return texts


def is_probe_pair(first: str, second: str) -> bool:
    """Whether a pair of nouns is kept for the evaluation's probe of colours: a fifth is.

    The composed phrases of the training do not contain these pairs.
    """
    key = " ".join(sorted((first, second)))
    return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


def composed_phrase(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """A phrase and its (noun, attribute) bindings."""
    first, second = rng.sample(NOUNS, 2)
    while is_probe_pair(first, second):
        first, second = rng.sample(NOUNS, 2)
    c1, c2 = rng.sample(COLOURS, 2)
    size, preposition, person, tone = (
        rng.choice(SIZES),
        rng.choice(PREPOSITIONS),
        rng.choice(PEOPLE),
        rng.choice(TONES),
    )
    cloth = rng.choice(CLOTHES)
    both = [(first, c1), (second, c2)]
    wearing = [(person, tone.split()[-1]), (cloth, c1)]
    return rng.choice([
        (f"a {c1} {first} and a {c2} {second}", both),
        (f"a {c1} {first} {preposition} a {c2} {second}", both),
        (f"the {first} is {c1} and the {second} is {c2}", both),
        (f"a {first} that is {c1} {preposition} a {c2} {second}", both),
        (f"{c1} {first}, {c2} {second}", both),
        (f"a {size} {c1} {first} {preposition} a {second}", [(first, c1)]),
        (f"a {size} {first} and a {c1} {second}", [(first, size), (second, c1)]),
        (f"two {c1} {first}s and a {c2} {second}", [(second, c2)]),
        (f"a {person} with {tone} skin and a {c1} {cloth}", wearing),
        (f"a {tone} skinned {person} wearing a {c1} {cloth}", wearing),
        (f"{person}: {tone.replace(' ', '-')} skin tone, {c1} {cloth}", wearing),
        (f"a {person} holding a {c1} {first} and a {c2} {second}", both),
    ])  # fmt: skip


def binding_positions(text: str, bindings: list[tuple[str, str]]) -> list[tuple[int, int]]:
    """(index of the noun, index of its attribute), in words.

    A colour that occurs twice is the occurrence nearest to its noun.
    """
    sequence = words(text)
    positions = []
    for noun, attribute in bindings:
        if sequence.count(noun) == 1 and attribute in sequence:
            at = sequence.index(noun)
            positions.append(
                (
                    at,
                    min(
                        (i for i, w in enumerate(sequence) if w == attribute),
                        key=lambda i: abs(i - at),
                    ),
                )
            )
    return positions


def build(coco: str, wordnet: str, emojibase: str, seed: int = 0) -> list[dict]:
    """All texts for the teacher, shuffled: dicts of text, kind, image and bindings.

    image: COCO's id or -1.
    """
    rng = random.Random(seed)
    train = training_captions(coco_captions(coco))
    rows = []
    for image in rng.sample(sorted(train), COCO_TAUGHT):
        rows.append(
            {"text": rng.choice(train[image]), "kind": "coco", "image": image, "bindings": []}
        )
    plain = [("gloss", t) for t in rng.sample(wordnet_glosses(wordnet), GLOSSES)]
    plain += [("emoji", t) for t in emoji_texts(emoji_entries(emojibase), rng)]
    rows += [{"text": t, "kind": kind, "image": -1, "bindings": []} for kind, t in plain]
    seen = set()
    while len(seen) < PHRASES:
        text, bindings = composed_phrase(rng)
        if text not in seen:
            seen.add(text)
            rows.append(
                {
                    "text": text,
                    "kind": "phrase",
                    "image": -1,
                    "bindings": binding_positions(text, bindings),
                }
            )
    rng.shuffle(rows)
    return rows
