"""Makes the data of `tools.reader_speed`: the same photographs in every layout.

DIR/tars/*.tar             WebDataset: JPEG of quality 90, caption
DIR/tars_N/*.tar           the images as `prepare_data --store_size N` stores them
DIR/parquet/*.parquet      the images of tars/
DIR/prepared, prepared_N   prepared data of tars/ and tars_N/, with random text features
"""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from imagen_jax.data import manifest_file, records
from imagen_jax.data.prepare.resize import Resize
from imagen_jax.data.prepare.upright import upright
from imagen_jax.run_log import Progress
from imagen_jax.storage import write_atomically
from tests.data import synthetic

SHARDS = 4
_REPEATS = 64  # of the prepared images: Grain's shuffle of less than 2^12 rows is slow
_TOKENS = (8, 40)  # of a caption; uniform
# Width and height in multiples of the shorter side.
_SHAPES = ((1, 1), (1.25, 1), (1, 1.25))


def make(root: Path, images: int, side: int, sizes: Sequence[int], text_dim: int) -> None:
    """Writes all layouts below `root`, which must be empty or absent.

    images: number of images. side: their shorter side in pixels. sizes: the N of tars_N and
    prepared_N. text_dim: width of the text features.

    Raises ValueError if there is something at `root`.
    """
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"--make: {root} is not empty; give a new directory")
    photographs = []
    with Progress("photographs made", images) as progress:
        for i in range(images):
            width, height = (int(side * part) for part in _SHAPES[i % len(_SHAPES)])
            image = synthetic.photograph(height, width, seed=i)
            photographs.append(synthetic.encode(image, "JPEG", quality=90))
            progress.update(i + 1)
    captions = [f"photograph {i}" for i in range(images)]
    _write_parquet(root / "parquet", photographs, captions)
    for size in (0, *sizes):
        stored = [_stored(data, size) for data in photographs]
        suffix = f"_{size}" if size else ""
        _write_tars(root / f"tars{suffix}", stored, captions)
        _write_prepared(root / f"prepared{suffix}", stored, captions, text_dim)


def _stored(data: bytes, size: int) -> bytes:
    """The image as `prepare_data --store_size` stores it; 0: as it is."""
    return Resize(size).encode(upright(data)[0]) if size else data


def _parts(count: int) -> list[range]:
    """The rows of each shard."""
    edges = np.linspace(0, count, min(SHARDS, count) + 1).astype(int).tolist()
    return [range(start, stop) for start, stop in zip(edges, edges[1:])]


def _write_tars(root: Path, images: Sequence[bytes], captions: Sequence[str]) -> None:
    root.mkdir(parents=True)
    for shard, rows in enumerate(_parts(len(images))):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for row in rows:
                for suffix, content in (("jpg", images[row]), ("txt", captions[row].encode())):
                    member = tarfile.TarInfo(f"{row:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _write_parquet(root: Path, images: Sequence[bytes], captions: Sequence[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    root.mkdir(parents=True)
    for shard, rows in enumerate(_parts(len(images))):
        columns = {
            "key": [f"{row:06d}" for row in rows],
            "image": [images[row] for row in rows],
            "caption": [captions[row] for row in rows],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), root / f"{shard:05d}.parquet")


def _write_prepared(
    root: Path, images: Sequence[bytes], captions: Sequence[str], text_dim: int
) -> None:
    """Prepared data of the split train; image i has caption i."""
    rng = np.random.default_rng(0)
    sizes = [upright(data)[0].size for data in images]
    lengths = rng.integers(*_TOKENS, len(images), endpoint=True).tolist()
    embedding = lambda length: rng.normal(size=(length, text_dim)).astype(ml_dtypes.bfloat16)
    image_rows = [
        records.serialize_image(records.ImageRow(data, height, width, f"photograph/{i}", (i,)))
        for i, (data, (width, height)) in enumerate(zip(images, sizes))
    ]
    caption_rows = [
        records.serialize_caption(records.CaptionRow(text, embedding(length)))
        for text, length in zip(captions, lengths)
    ]
    parts = _parts(len(images))
    shards = _write_store(root, "images", image_rows, parts, _REPEATS)
    shards |= _write_store(root, "captions", caption_rows, parts, 1)
    manifest = {
        "format_version": manifest_file.FORMAT_VERSION,
        "encoder": {"name": "random", "dim": text_dim},
        "counts": {
            "images": {"train": _REPEATS * len(images), "heldout": 0},
            "captions": len(captions),
        },
        "embedding": {"length": {"min": min(lengths), "max": max(lengths)}},
        "image_sizes": {"min_side": min(map(min, sizes))},
        "shards": shards,
    }
    manifest["hash"] = manifest_file.manifest_hash(manifest)
    write_atomically(root / manifest_file.MANIFEST, json.dumps(manifest).encode())


def _write_store(
    root: Path, store: str, rows: Sequence[bytes], parts: Sequence[range], repeats: int
) -> dict[str, dict]:
    """Writes the shards of a store, each `repeats` times as links to one file; their entries."""
    shards = {}
    for index in range(repeats * len(parts)):
        name = records.shard_name(store, "train", index, repeats * len(parts))
        first = records.shard_name(store, "train", index % len(parts), repeats * len(parts))
        if index < len(parts):
            shards[name] = records.write_shard(root, name, [rows[i] for i in parts[index]])
        else:
            (root / name).symlink_to(Path(first).name)
            shards[name] = shards[first]
    return shards
