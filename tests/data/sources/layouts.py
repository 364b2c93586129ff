"""Writes one collection of pictures in every layout that `--source` reads.

A writer of `LAYOUTS` takes a new directory and the pictures, and returns the value of `--source`
with its flags.
"""

import csv
import dataclasses
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from imagen_jax.data import records
from imagen_jax.data.sources import source as sources
from tests.data import synthetic

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
FIELDS = ("caption_long", "caption_short", "caption_tags", "caption_user")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An encoded image with one to four captions."""

    key: str
    suffix: str
    data: bytes
    captions: list[str]

    @property
    def file(self) -> str:
        return f"{self.key}.{self.suffix}"


def collection(count):
    """8 to 2048 pictures: number 2 is small, number 5 has the pixels of number 1.

    All even numbers share a caption. Formats alternate, and so do sizes.
    """
    pictures = []
    for i in range(count):
        kind = list(SUFFIXES)[i % 3]
        size = 6 if i == 2 else 16 + i % 7
        array = synthetic.gradient(size, i)
        array[:, :, 0] = array[:, :, 0] // 2 + 16 * (i // 256)  # blue repeats
        options = {"quality": 90} if kind == "JPEG" else {}
        data = synthetic.encode(array, kind, **options)
        captions = [f"picture {i}, “red”", f'a "ramp" of {size}', f"größe {i}", "a, b, c"][
            : 1 + i % 4
        ]
        captions += ["a shared caption"] if i % 2 == 0 and len(captions) < 4 else []
        pictures.append(Picture(f"{i:09d}", SUFFIXES[kind], data, captions))
    twin = synthetic.encode(synthetic.gradient(17, 1), "PNG", compress_level=0)
    pictures[1] = dataclasses.replace(
        pictures[1], suffix="png", data=synthetic.encode(synthetic.gradient(17, 1))
    )
    pictures[5] = dataclasses.replace(
        pictures[5], suffix="png", data=twin, captions=["a twin", *pictures[1].captions[:1]]
    )
    return pictures


def opened(source, *options, index=None):
    """The source, as the command opens it."""
    values = flags.FlagValues()
    sources.define_flags(values)
    values(["prepare_data", f"--source={source}", *options])
    return sources.open_source(values, index)


def _images(directory, pictures, below="."):
    for picture in pictures:
        path = directory / below / picture.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.data)


def folder_jsonl(directory, pictures):
    _images(directory, pictures)
    rows = [{"file": p.file, "captions": p.captions} for p in pictures]
    (directory / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return (f"folder:{directory}",)


def folder_csv(directory, pictures):
    _images(directory, pictures)
    with open(directory / "captions.csv", "w", newline="", encoding="utf-8") as file:
        rows = [(p.file, caption) for p in pictures for caption in p.captions]
        csv.writer(file).writerows([("file", "caption"), *rows])
    return (f"folder:{directory}",)


def folder_txt(directory, pictures):
    _images(directory, pictures, "deep")
    for picture in pictures:
        text = "\n".join(picture.captions)
        (directory / "deep" / f"{picture.key}.txt").write_text(text, "utf-8")
    return (f"folder:{directory}",)


def folder_coco(directory, pictures):
    """The annotations in another order than the images, which lie in a subfolder."""
    _images(directory, pictures, "val2014")
    images = [{"id": 7 * i, "file_name": p.file} for i, p in enumerate(pictures)]
    said = [(7 * i, text) for i, p in enumerate(pictures) for text in p.captions]
    annotations = [
        {"id": at, "image_id": id, "caption": text} for at, (id, text) in enumerate(said[::-1])
    ]
    content = {"images": images[::-1], "annotations": annotations}
    (directory / "captions_val2014.json").write_text(json.dumps(content))
    return (f"folder:{directory}",)


def _tars(directory, pictures, members):
    """Two shards. members: of a list of pictures, (name, content)."""
    half = len(pictures) // 2
    for shard, part in enumerate((pictures[:half], pictures[half:])):
        with tarfile.open(directory / f"{shard:05d}.tar", "w") as tar:
            for name, content in members(part):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return f"webdataset:{directory}/{{00000..00001}}.tar"


def _img2dataset(picture):
    content = {"key": picture.key, "status": "success", "more": picture.captions[1:]}
    return [
        (picture.file, picture.data),
        (f"{picture.key}.json", json.dumps(content).encode()),
        (f"{picture.key}.txt", picture.captions[0].encode()),
    ]


def tar_img2dataset(directory, pictures):
    name = _tars(directory, pictures, lambda part: [m for p in part for m in _img2dataset(p)])
    return name, "--webdataset_captions=txt,more"


def tar_gpic(directory, pictures):
    """JSON with four fields of captions before each image."""

    def members(part):
        for p in part:
            fields = dict.fromkeys(FIELDS) | dict(zip(FIELDS, p.captions))
            yield f"{p.key}.json", json.dumps(fields).encode()
            yield p.file, p.data

    return _tars(directory, pictures, members), f"--webdataset_captions={','.join(FIELDS)}"


def tar_apart(directory, pictures):
    """Members of an item are far from each other: all images, then all texts, then all JSON."""

    def members(part):
        found = [_img2dataset(p) for p in part]
        return [item[at] for at in (0, 2, 1) for item in found]

    return _tars(directory, pictures, members), "--webdataset_captions=txt,more"


def _parquet(directory, rows):
    half = len(rows) // 2
    for shard, part in enumerate((rows[:half], rows[half:])):
        table = pa.Table.from_pylist(part)
        pq.write_table(table, directory / f"train-{shard}.parquet", row_group_size=5)
    return f"parquet:{directory}/*.parquet"


def parquet_binary(directory, pictures):
    rows = [{"image": p.data, "caption": p.captions} for p in pictures]
    return (_parquet(directory, rows),)


def parquet_hub(directory, pictures):
    rows = [
        {
            "image": {"bytes": p.data, "path": p.file},
            "sentences": [{"raw": text, "id": i} for i, text in enumerate(p.captions)],
        }
        for p in pictures
    ]
    return _parquet(directory, rows), "--parquet_caption=sentences.raw"


def parquet_paths(directory, pictures):
    _images(directory, pictures, "images")
    rows = [
        {"path": f"images/{p.file}"} | dict.fromkeys(FIELDS, None) | dict(zip(FIELDS, p.captions))
        for p in pictures
    ]
    options = "--parquet_image=path", f"--parquet_caption={','.join(FIELDS)}"
    return _parquet(directory, rows), *options


def tfds_array_record(directory, pictures):
    import tensorflow_datasets as tfds

    many = tfds.features.Sequence({"text": tfds.features.Text()})
    image = tfds.features.Image(shape=(None, None, 3))
    features = tfds.features.FeaturesDict({"image": image, "captions": many})
    half, shards = len(pictures) // 2, {}
    for shard, part in enumerate((pictures[:half], pictures[half:])):
        name = records.shard_name("captions", "train", shard, 2)
        rows = [{"image": p.data, "captions": [{"text": t} for t in p.captions]} for p in part]
        examples = [features.serialize_example(row) for row in rows]
        shards[name] = records.write_shard(directory, name, examples)
    records.write_tfds_metadata(directory, "captions", features, shards)
    return f"tfds:{directory}/captions", "--tfds_caption=captions/text"


LAYOUTS = {
    writer.__name__: writer
    for writer in (
        folder_jsonl,
        folder_csv,
        folder_txt,
        folder_coco,
        tar_img2dataset,
        tar_gpic,
        tar_apart,
        parquet_binary,
        parquet_hub,
        parquet_paths,
        tfds_array_record,
    )
}
ONE_OF_EACH_KIND = {
    writer.__name__: writer
    for writer in (folder_jsonl, tar_img2dataset, parquet_hub, tfds_array_record)
}
