"""Generated images and a small prepared directory, written by hand, for the tests of data."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from PIL import Image

from imagen_jax import storage
from imagen_jax.data import manifest_file, records
from imagen_jax.data.caption_records import caption_features

DIM = 8
TEXT_LENGTH = 6
# Fields of a config section `data` whose batches are centre squares of one directory.
SQUARES = {"mixture": (), "view": "centre", "view_scale": (0.8, 1.0), "buckets": ()}
SQUARES |= {"decode": "exact", "shard_cache_dir": "", "shard_cache_gib": 1.0}


def gradient(size: int | tuple[int, int], tag: int = 0) -> np.ndarray:
    """uint8 [h w 3]: red is the column, green the row, scaled to 0..255; blue is `tag`.

    size: height and width, or the side of a square.
    """
    height, width = (size, size) if isinstance(size, int) else size
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = (np.arange(width) * 256 // width)[None, :]
    image[..., 1] = (np.arange(height) * 256 // height)[:, None]
    image[..., 2] = tag % 256
    return image


def encode(image: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """Encoded bytes of a uint8 image."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def embedding(caption_id: int, length: int) -> np.ndarray:
    """Token features [length DIM] bfloat16: token i is caption_id + i / 8 throughout."""
    return np.repeat(caption_id + np.arange(length)[:, None] / 8, DIM, axis=1).astype(
        ml_dtypes.bfloat16
    )


def write_prepared(
    root: Path,
    images: int = 10,
    size: int = 64,
    heldout: int = 3,
    shard_rows: int = 4,
    shapes: Sequence[tuple[int, int]] = (),
    encoder: Mapping[str, str] | None = None,
) -> Path:
    """Writes a complete prepared directory.

    Image i of `train` has captions 2i and 2i+1, each held-out image has caption 0.

    shapes: height and width of the images of `train`, in turn; by default squares of `size`.
    encoder: further fields of the encoder's identity.
    """
    shape = lambda i: shapes[i % len(shapes)] if shapes else (size, size)
    captions = [f"caption {i}" for i in range(2 * images)]
    lengths = [1 + i % TEXT_LENGTH for i in range(len(captions))]
    rows = {
        "train": [_image(i, shape(i), (2 * i, 2 * i + 1)) for i in range(images)],
        "heldout": [_image(100 + i, (size, size), (0,)) for i in range(heldout)],
    }
    shards = {}
    for split, split_rows in rows.items():
        _write(
            root,
            shards,
            "images",
            split,
            [records.serialize_image(row) for row in split_rows],
            shard_rows,
        )
    stored = [records.CaptionRow(text, embedding(i, lengths[i])) for i, text in enumerate(captions)]
    _write(
        root,
        shards,
        "captions",
        "train",
        [records.serialize_caption(row) for row in stored],
        shard_rows,
    )
    records.write_tfds_metadata(root, "images", records.image_features(), shards)
    records.write_tfds_metadata(root, "captions", caption_features(DIM), shards)
    manifest = {
        "format_version": manifest_file.FORMAT_VERSION,
        "encoder": {"name": "fake", "dim": DIM, "max_length": TEXT_LENGTH} | dict(encoder or {}),
        "max_length": TEXT_LENGTH,
        "counts": {
            "images": {"train": images, "heldout": heldout},
            "captions": len(captions),
            "skipped": {},
        },
        "embedding": {"length": {"min": 1, "max": max(lengths)}},
        "image_sizes": {"min_side": min(size, *(min(shape(i)) for i in range(images)))},
        "shards": shards,
    }
    manifest["hash"] = manifest_file.manifest_hash(manifest)
    storage.write_atomically(root / manifest_file.MANIFEST, json.dumps(manifest).encode())
    return root


def _image(tag: int, shape: tuple[int, int], caption_ids: tuple[int, ...]) -> records.ImageRow:
    return records.ImageRow(encode(gradient(shape, tag)), *shape, f"image-{tag}", caption_ids)


def _write(
    root: Path, shards: dict, store: str, split: str, rows: list[bytes], shard_rows: int
) -> None:
    count = -(-len(rows) // shard_rows)
    for index in range(count):
        name = records.shard_name(store, split, index, count)
        shards[name] = records.write_shard(
            root, name, rows[index * shard_rows : (index + 1) * shard_rows]
        )


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height width 3]: an image with the statistics of a photograph.

    The sum of a smooth gradient, texture whose amplitude falls with frequency as 1 / f, correlated
    between the colours, and 12 filled ellipses with sharp edges, under weak noise of a sensor.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.linspace(-1, 1, height)[:, None, None], np.linspace(-1, 1, width)[:, None]
    image = 120 + 40 * rows * rng.uniform(-1, 1, 3) + 40 * columns * rng.uniform(-1, 1, 3)
    for _ in range(12):
        row, column = rng.uniform(-1, 1, 2)
        inside = ((rows - row) / rng.uniform(0.05, 0.5)) ** 2
        inside = inside + ((columns - column) / rng.uniform(0.05, 0.5)) ** 2 < 1
        image = np.where(inside, image + rng.uniform(-60, 60, 3), image)
    image = (
        image
        + 25 * _texture(rng, height, width)
        + 8 * rng.uniform(size=3) * _texture(rng, height, width)
    )
    return np.clip(image + rng.normal(0, 1.5, image.shape), 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[height width 1] of standard deviation 1 with an amplitude of 1 / f."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    texture = np.fft.irfft2(
        np.fft.rfft2(rng.normal(size=(height, width))) / frequency, (height, width)
    )
    return (texture / texture.std())[..., None]
