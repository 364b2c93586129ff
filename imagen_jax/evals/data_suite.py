"""The captions of prepared data as a prompt suite, whose pictures have a right answer: the images.

`retrieval` finds the captioned image among all images of the data.
"""

import concurrent.futures
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from imagen_jax.data.records import Prepared
from imagen_jax.evals import nearest
from imagen_jax.evals.real_images import Images, PreparedImages
from imagen_jax.evals.statistics import grouped_proportion
from imagen_jax.evals.suites import Prompt, Suite, draw_key, prompts_sha256

CHUNK = 256  # images of the gallery, and pictures, whose distances are computed at once
PICTURE_BYTES = 2**30  # of the pictures that are compared with the gallery in one pass


def load(prepared: Prepared, split: str, count: int | None, seed: int) -> Suite:
    """The first captions of `count` images of a split, drawn by seed; all in order for None.

    The id of a prompt is the row of its image. Raises ValueError for an empty split, and if there
    are fewer images.
    """
    images, captions = prepared.images(split), prepared.captions()
    available = len(images)
    if count is not None and not 1 <= count <= available:
        raise ValueError(
            f"{prepared.path} has {available:,} images in split {split}, but {count:,} captions are"
            f" to be drawn: draw 1 to {available:,}"
        )
    rows = range(available)
    if count is not None:
        rows = sorted(rows, key=lambda row: draw_key(seed, row))[:count]
    prompts = [Prompt(row, captions[images[row].caption_ids[0]].text, split, "") for row in rows]
    identity: dict[str, Any] = {
        "name": "data",
        "protocol": f"the first captions of images of split {split} of prepared data",
        "file": str(prepared.path),
        "sha256": prepared.hash,
        "count": len(prompts),
        "available": available,
        "seed": None if count is None else seed,
        "prompts_sha256": prompts_sha256(prompts),
    }
    return Suite("data", prompts, "", identity)


def pictures_at_once(size: int) -> int:
    """The number of pictures of `size` pixels that `ranks` compares in one pass of the gallery."""
    return max(1, PICTURE_BYTES // (3 * size**2))


def ranks(
    pictures: Sequence[np.ndarray], own: Int[np.ndarray, " n"], gallery: PreparedImages
) -> Int[np.ndarray, "n 2"]:
    """For each picture the rank of its own image among the gallery, and the size of the gallery.

    own: the position of that image in the gallery. See `nearest` for the distance. All images of
    the gallery are read once. Holds the pictures, and CHUNK images.
    """
    nearer = np.zeros(len(own), np.int64)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        read = lambda images, rows: np.stack(list(pool.map(images.__getitem__, rows)))
        samples = read(pictures, range(len(own)))
        parts = _parts(len(own))
        mine = lambda part: nearest.own_distances(samples[part], read(images, own[part]))
        images = Images(gallery, 0, len(gallery))
        limits = np.concatenate([mine(part) for part in parts])
        for start in range(0, len(gallery), CHUNK):
            some = read(images, range(start, min(start + CHUNK, len(gallery))))
            for part in parts:
                found = nearest.distances(samples[part], some) <= limits[part, None]
                nearer[part] += found.sum(axis=1)
    return np.stack([nearer, np.full_like(nearer, len(gallery))], axis=1)


def _parts(count: int) -> list[slice]:
    """Slices of at most CHUNK rows, whose distances are computed at once."""
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def summary(ranks: Int[np.ndarray, "n 2"], per_prompt: int = 1) -> dict[str, Any]:
    """The rates at which the own image is the nearest, or one of the 5 nearest.

    per_prompt: pictures of a prompt, which share the own image, in consecutive rows.
    """
    found = ranks[:, 0].reshape(-1, per_prompt)
    top = {f"top{k}": grouped_proportion(found <= k) for k in (1, 5)}
    return top | {"n": len(ranks), "gallery": int(ranks[0, 1])}
