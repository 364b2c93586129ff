"""The commands of docs/data-recipes.md, as written, on pictures in the layout of each data set."""

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags

from imagen_jax import cli, prepare_data
from imagen_jax.data import records
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.weights import text_encoders
from tests.data import synthetic
from tests.data.synthetic_source import FakeEncoder

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data-recipes.md"
STYLES = {
    "tag": "apple, table",
    "short": "A red apple.",
    "medium": "A red apple on a table.",
    "long": "A red apple lies on a brown table beside a window in the morning.",
}


def commands():
    """{--output, or "preview" for an estimate: words of a prepare_data command of the page}."""
    blocks = re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines if "imagen_jax.prepare_data" in line]
    name = lambda words: words[words.index("--output") + 1]
    keys = ["preview" if "--preview_captions" in words else name(words) for words in found]
    assert len(keys) == len(set(keys))
    return dict(zip(keys, found))


COMMANDS = commands()


def picture(kind, height, width, tag):
    """An encoded image; no two tags have the same pixels."""
    return synthetic.encode(synthetic.gradient(max(height, width), tag)[:height, :width], kind)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def gpic_members(shard):
    """Four images, one of each style of caption: JPEG and PNG, each after its JSON. The second is
    256 pixels wide only, the fourth is one of nano.
    """
    sizes = ((300, 340), (200, 256), (340, 300), (256, 256))
    for i, (style, text) in enumerate(STYLES.items()):
        key, (height, width) = f"{shard}{i:07d}", sizes[i]
        metadata = {
            "retrieved_at": "2026-01-01",
            "license": "CC BY 2.0",
            "license_url": "https://creativecommons.org/licenses/by/2.0/",
            "attribution": "somebody",
            "key": key,
            "img_width": width,
            "img_height": height,
            "split": ["nano", "lite", "full"] if i == 3 else ["full"],
            "caption_type": style,
            "caption": f"{text} {shard}",
        }
        kind, suffix = (("JPEG", "jpg"), ("PNG", "png"))[i % 2]
        yield f"{key}.json", json.dumps(metadata).encode()
        yield f"{key}.{suffix}", picture(kind, height, width, 8 * shard + i)


def gpic(root):
    """The first and the last tar of each part; test images differ from training images."""
    for part, last, first in (("train", 7999, 0), ("val", 31, 2), ("test", 127, 4)):
        for at, shard in enumerate((0, last)):
            path = root / "gpic" / part / f"gpic_{part}_{shard:05d}.tar"
            write_tar(path, gpic_members(first + at))


def img2dataset(root, name, **columns):
    """Two tars with the files that the tool writes beside them. The third of four URLs failed; the
    last image is small. columns: those of --save_additional_columns, lists by image.
    """
    for shard in range(2):
        rows, members = [], []
        for i, side in enumerate((320, 256, 0, 100)):
            key = f"{shard:05d}{i:04d}"
            row = {
                **{column: values[i] for column, values in columns.items()},
                "caption": f"a picture of <PERSON> {key}",
                "url": f"https://example.org/{key}.jpg",
                "key": key,
                "status": "success" if side else "failed_to_download",
                "error_message": None if side else "HTTP Error 404: Not Found",
                "width": side or None,
                "height": 256 if side > 256 else side or None,
                "original_width": 2 * side or None,
                "original_height": 2 * side or None,
                "exif": "{}",
                "sha256": "0" * 64,
            }
            rows.append(row)
            if side:
                image = picture("JPEG", row["height"], side, 8 * shard + i)
                members += [
                    (f"{key}.jpg", image),
                    (f"{key}.json", json.dumps(row).encode()),
                    (f"{key}.txt", row["caption"].encode()),
                ]
        write_tar(root / name / f"{shard:05d}.tar", members)
        pq.write_table(pa.Table.from_pylist(rows), root / name / f"{shard:05d}.parquet")
        stats = {"count": 4, "successes": 3, "failed_to_download": 1}
        (root / name / f"{shard:05d}_stats.json").write_text(json.dumps(stats))


def cc12m(root):
    img2dataset(root, "cc12m")


def laion(root):
    img2dataset(
        root,
        "laion",
        similarity=[0.31, 0.35, None, 0.4],
        punsafe=[0.01, 0.9, None, 0.01],
        pwatermark=[0.1, 0.1, None, 0.1],
        AESTHETIC_SCORE=[6.0, 5.0, None, 5.0],
    )


def coco(root):
    """Two images a part with five captions each, and the files of captions beside them."""
    for tag, part in enumerate(("train2014", "val2014")):
        folder = root / "coco" / part
        folder.mkdir(parents=True)
        images, annotations = [], []
        for i in (9, 25):
            file = f"COCO_{part}_{i:012d}.jpg"
            (folder / file).write_bytes(picture("JPEG", 427, 640, 64 * tag + i))
            images.append({"id": i, "file_name": file, "height": 427, "width": 640})
            annotations += [
                {
                    "id": 10 * i + n,
                    "image_id": i,
                    "caption": f"Sentence {n} on picture {i} of {part}.",
                }
                for n in range(5)
            ]
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
        (folder / f"captions_{part}.json").write_text(json.dumps(content))


def own(root):
    """Twenty pictures and the file of captions that the page shows."""
    folder = root / "pictures"
    folder.mkdir()
    rows = ["file,caption"]
    for i in range(20):
        (folder / f"{i}.png").write_bytes(picture("PNG", 20, 20, i))
        rows.append(f'{i}.png,"a red apple, number {i}"')
    (folder / "captions.csv").write_text("\n".join(rows))


def hub(root):
    """Two files of a struct of bytes and path, and a text, with the hub's metadata."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("text", pa.string())])
    about = {"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string"}}}}
    schema = schema.with_metadata({"huggingface": json.dumps(about)})
    (root / "naruto" / "data").mkdir(parents=True)
    for shard, digest in enumerate(("12944970063701d5", "cefa2f480689f147")):
        rows = [
            {
                "image": {"bytes": picture("PNG", 300, 300, 2 * shard + i), "path": None},
                "text": f"a drawing {shard} {i}",
            }
            for i in range(2)
        ]
        path = root / "naruto" / "data" / f"train-{shard:05d}-of-00002-{digest}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema), path)


# The layout that a command reads, the images and captions of its result, and the reasons in
# skipped.jsonl.
EXPECTED = {
    "data/pictures": (own, 20, 20, {}),
    "data/gpic": (gpic, 6, 6, {"small_image": 2, "missing_shard": 7998}),
    "data/gpic_val": (gpic, 6, 6, {"small_image": 2, "missing_shard": 30}),
    "data/gpic_test": (gpic, 6, 6, {"small_image": 2, "missing_shard": 126}),
    "data/gpic_nano": (gpic, 2, 2, {"filtered": 6, "missing_shard": 7998}),
    "data/gpic_80": (gpic, 3, 3, {"small_image": 1, "missing_shard": 79}),
    "data/cc12m": (cc12m, 4, 4, {"small_image": 2}),
    "data/laion": (laion, 2, 2, {"small_image": 2, "filtered": 2}),
    "data/coco_train": (coco, 2, 10, {}),
    "data/coco_val": (coco, 2, 10, {}),
    "data/naruto": (hub, 4, 4, {}),
}


def run(words, monkeypatch):
    """Runs a command of the page, with another text encoder and one worker process."""
    assert words[:3] == ["python", "-m", "imagen_jax.prepare_data"]
    encoder = FakeEncoder(max_length=128)
    monkeypatch.setattr(prepare_data, "_encoders", lambda *_: Encoders.single(encoder))
    monkeypatch.setattr(text_encoders, "load_tokenize", lambda *_: (encoder.tokenize, 4096, 0))
    monkeypatch.setattr(cli, "cores", lambda: 1)
    values = flags.FlagValues()
    prepare_data.define_flags(values)
    values(words[2:])
    assert not values(words[2:])[1:], "words that are no flags"
    prepare_data._run(values)


def test_every_command_is_tested():
    """Catches a command on the page that no test runs."""
    assert set(COMMANDS) == {*EXPECTED, "preview"}


# Looking for 8,000 tars takes a second; once is enough.
@pytest.mark.parametrize(
    "output",
    [
        pytest.param(output, marks=[pytest.mark.slow] * (output == "data/gpic_nano"))
        for output in EXPECTED
    ],
)
def test_command(output, tmp_path, monkeypatch):
    """Catches a command that no longer fits the layout: no captions or the wrong ones, images that
    are lost or kept against the page, images larger than --store_size.
    """
    layout, images, captions, skipped = EXPECTED[output]
    layout(tmp_path)
    monkeypatch.chdir(tmp_path)
    run(COMMANDS[output], monkeypatch)
    data = records.Prepared(tmp_path / output)
    counts = data.manifest["counts"]
    assert sum(counts["images"].values()) == images and counts["captions"] == captions
    assert counts["skipped"] == skipped
    words = {"apple", "<PERSON>", "Sentence", "drawing"}
    assert all(words & set(re.findall(r"<?\w+>?", row.text)) for row in data.captions())
    if "--store_size" in COMMANDS[output]:
        assert data.manifest["store_size"] == data.manifest["image_sizes"]["min_side"] == 256


def test_preview(tmp_path, monkeypatch, capsys):
    """Catches an estimate from other texts than the captions of the tar, or of another number."""
    gpic(tmp_path)
    monkeypatch.chdir(tmp_path)
    run(COMMANDS["preview"], monkeypatch)
    told = capsys.readouterr().out
    tokens = np.mean([len(f"{text} 0".split()) + 1 for text in STYLES.values()])
    assert "100,000,000" in told and f"{tokens:.1f}" in told
    assert not (tmp_path / "data").exists()
