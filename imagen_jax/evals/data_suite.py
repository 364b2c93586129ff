"""The captions of prepared data as a prompt suite, whose pictures have a right answer: the images.

`retrieval` finds the captioned image among all images of the data.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from imagen_jax.data.records import Prepared
from imagen_jax.evals import nearest
from imagen_jax.evals.real_images import Images, PreparedImages
from imagen_jax.evals.statistics import proportion
from imagen_jax.evals.suites import Prompt, Suite, prompts_sha256, rank

CHUNK = 256  # images of the gallery


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
        rows = sorted(rows, key=lambda row: rank(seed, row))[:count]
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


def ranks(
    pictures: Sequence[np.ndarray], own: Int[np.ndarray, " n"], gallery: PreparedImages
) -> Int[np.ndarray, "n 2"]:
    """For each picture the rank of its own image among the gallery, and the size of the gallery.

    own: the position of that image in the gallery. See `nearest` for the distance.
    """
    samples, distances = np.stack(pictures), []
    for start in range(0, len(gallery), CHUNK):
        images = np.stack(Images(gallery, start, start + CHUNK)[:])
        distances.append(nearest.distances(samples, images))
    found = nearest.ranks(np.concatenate(distances, axis=1), own)
    return np.stack([found, np.full_like(found, len(gallery))], axis=1)


def summary(ranks: Int[np.ndarray, "n 2"]) -> dict[str, Any]:
    """The rates at which the own image is the nearest, or one of the 5 nearest."""
    top = {f"top{k}": proportion(int((ranks[:, 0] <= k).sum()), len(ranks)) for k in (1, 5)}
    return top | {"n": len(ranks), "gallery": int(ranks[0, 1])}
