"""Prompt suites: named, ordered lists of prompts with categories, and reference images.

A suite is a pure function of the content of its file, the number of prompts and a seed. Result
files store its `identity`, which holds all three and checksums.
"""

import dataclasses
import hashlib
import heapq
import importlib.resources
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imagen_jax.checksums import sha256_file
from imagen_jax.data.sources import caption_files, coco
from imagen_jax.data.sources.caption_files import Caption
from imagen_jax.evals.real_images import SUFFIXES
from imagen_jax.storage import check_local

EMBEDDED = "imagen_jax/assets/suites/embedded.csv"
COCO = "coco"
COCO_PROMPTS = 30_000  # of zero-shot FID-30K
_NAMED = 3  # missing images that a message names


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a suite. image: the file of its reference image in the folder, "" for none.

    The id is unique in the suite and does not change with the number of prompts or the seed.
    """

    id: int
    text: str
    category: str
    image: str


@dataclasses.dataclass(frozen=True)
class Suite:
    """An ordered list of prompts.

    images: the folder of reference images, "" for none. identity: JSON for result files.
    """

    name: str
    prompts: Sequence[Prompt]
    images: str
    identity: dict[str, Any]

    def other_reference(self, count: int) -> str:
        """A warning if `count` real images are not the reference of the published protocol."""
        if self.name != COCO or count == coco.VAL2014["images"]:
            return ""
        return (
            f"{count:,} real images are not the {coco.VAL2014['images']:,} of COCO's validation"
            " set, the reference of FID-30K: compare no published number with these distances"
        )

    def categories(self) -> dict[str, int]:
        """The number of prompts of each category, in the order of first occurrence."""
        return dict(Counter(prompt.category for prompt in self.prompts))


class _Kind(NamedTuple):
    """How a suite is read. paired: each prompt describes one image of the reference."""

    read: Callable[[Path, Counter], Iterator[Caption]]
    protocol: str
    paired: bool = False


KINDS = {
    COCO: _Kind(
        coco.read_annotations,
        "zero-shot FID on COCO 2014 (Imagen, section 3): captions drawn at random without"
        " replacement from all captions of the validation set, so that an image may occur several"
        " times; the reference is the full validation set",
        paired=True,
    ),
    "prompts": _Kind(caption_files.read_prompt_file, "a file with one prompt per line"),
    "drawbench": _Kind(
        caption_files.read_drawbench, "DrawBench (Imagen, section 4): 200 prompts in 11 categories"
    ),
    "partiprompts": _Kind(
        caption_files.read_partiprompts, "PartiPrompts: 1,632 prompts in 12 categories"
    ),
    "geneval": _Kind(
        caption_files.read_geneval, "GenEval: 553 prompts in 6 categories, 4 images per prompt"
    ),
    "gpic": _Kind(
        caption_files.read_gpic,
        "GPIC (arXiv 2605.30341, section 3): one image for each of the 50,000 fixed test captions;"
        " the reference is the test set of 1M images",
        paired=True,
    ),
    "embedded": _Kind(
        caption_files.read_embedded,
        "the suite of imagen_jax: 200 prompts in 11 categories with the sizes of DrawBench",
    ),
}
COCO_LIST = _Kind(
    coco.read_list,
    "zero-shot FID on COCO 2014 (Imagen, section 3) with a fixed list of captions of the validation"
    " set; the reference is the full validation set",
    paired=True,
)


def load_suite(
    name: str, *, file: str = "", images: str = "", count: int | None = None, seed: int = 0
) -> Suite:
    """Loads and validates a suite.

    file: the list; "embedded" needs none. images: the folder of reference images; if the prompts
    describe images ("coco", "gpic"), each of them must be there. count: the number of prompts,
    drawn by `seed`. Without it, a suite is whole and in the order of the file; the captions of COCO
    are 30,000 drawn ones.

    Raises:
      ValueError: the file or the folder is not what the suite needs.
    """
    if name not in KINDS:
        raise ValueError(
            f"there is no suite {name!r}: choose one of {', '.join(KINDS)}, or data (the captions"
            " of prepared data)"
        )
    path = _path(name, file)
    kind = KINDS[name]
    if name == COCO and path.suffix.lower() in (".csv", ".tsv"):
        kind = COCO_LIST
    elif name == COCO and count is None:
        count = COCO_PROMPTS
    names = _image_names(images)
    notes: Counter[str] = Counter()
    captions, available = select(kind.read(path, notes), count, seed, str(path))
    prompts = tuple(_pair(captions, kind.paired, images, names))
    identity = {
        "name": name,
        "protocol": kind.protocol,
        "file": file or EMBEDDED,
        "sha256": sha256_file(path),
        "count": len(prompts),
        "available": available,
        "seed": None if count is None else seed,
        "prompts_sha256": prompts_sha256(prompts),
        "repeated_texts": len(prompts) - len({prompt.text for prompt in prompts}),
        "notes": {reason: number for reason, number in sorted(notes.items()) if number},
        "images": images,
        "images_in_folder": None if names is None else len(names),
    }
    return Suite(name, prompts, images, identity)


def _path(name: str, file: str) -> Path:
    if name == "embedded":
        if file:
            raise ValueError(f"the embedded suite has its own file: leave out {file}")
        return Path(str(importlib.resources.files("imagen_jax"))).parent / EMBEDDED
    if not file:
        raise ValueError(f"the suite {name} needs a file: docs/evaluation.md says where to get it")
    check_local(f"the file of the suite {name}", file)
    if not Path(file).is_file():
        raise ValueError(
            f"{file} is not a file: docs/evaluation.md says where to get the suite {name}"
        )
    return Path(file)


def select(
    captions: Iterable[Caption], count: int | None, seed: int, where: str
) -> tuple[list[Caption], int]:
    """Draws `count` captions, all in their order for None. Returns them and the number available.

    A draw sorts the captions by a hash of the seed and the id, so that it does not depend on their
    order or on a random number generator, and a smaller draw is the beginning of a larger one.
    Holds `count` captions.
    """
    if count is None:
        whole = list(captions)
        _check_count(len(whole), 1, where)
        return whole, len(whole)
    if count < 1:
        raise ValueError(f"the number of prompts is {count}: give 1 or more")
    available = 0

    def ranked() -> Iterator[tuple[bytes, int, Caption]]:
        nonlocal available
        for caption in captions:
            available += 1
            yield draw_key(seed, caption.id), caption.id, caption

    drawn = [caption for *_, caption in heapq.nsmallest(count, ranked())]
    _check_count(available, count, where)
    return drawn, available


def draw_key(seed: int, number: int) -> bytes:
    """The sort key of a caption in a draw: SHA-256 of "SEED/ID" in decimal digits."""
    return hashlib.sha256(f"{seed}/{number}".encode()).digest()


def _check_count(available: int, count: int, where: str) -> None:
    if available == 0:
        raise ValueError(f"{where} has no prompt: give a file with prompts")
    if available < count:
        raise ValueError(
            f"{where} has {available:,} prompts, but {count:,} are to be drawn: give a complete"
            f" file, or draw at most {available:,}"
        )


def prompts_sha256(prompts: Iterable[Prompt]) -> str:
    """SHA-256 of the list: one line of JSON [id, text, category] per prompt, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        row = [prompt.id, prompt.text, prompt.category]
        digest.update((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()


def _image_names(images: str) -> set[str] | None:
    """The names of the image files in a folder, None if there is no folder."""
    if not images:
        return None
    check_local("the folder of reference images", images)
    if not Path(images).is_dir():
        raise ValueError(f"{images} is not a folder: give the folder of the reference images")
    with os.scandir(images) as entries:
        names = {entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES)}
    if not names:
        raise ValueError(
            f"{images} has no images ({' '.join(SUFFIXES)}): give the folder that holds them, not"
            " one above it"
        )
    return names


def _pair(
    captions: Sequence[Caption], paired: bool, images: str, names: set[str] | None
) -> Iterator[Prompt]:
    """The prompts with the files of their reference images, all of which must exist.

    A caption of GPIC names its image without the suffix.
    """
    if not paired or names is None:
        yield from (Prompt(caption.id, caption.text, caption.category, "") for caption in captions)
        return
    missing = {}
    for caption in captions:
        candidates = (caption.image, *(caption.image + suffix for suffix in SUFFIXES))
        image = next((name for name in candidates if name in names), "")
        if not image:
            missing[caption.image] = None
        yield Prompt(caption.id, caption.text, caption.category, image)
    if missing:
        listed = ", ".join(list(missing)[:_NAMED])
        more = ", ..." if len(missing) > _NAMED else ""
        raise ValueError(
            f"{len(missing):,} of the reference images are not in {images}: {listed}{more}; copy"
            " them there, or give the folder that has them"
        )
