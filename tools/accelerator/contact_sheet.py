"""Captions to sample, and the contact sheet of the samples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tools.accelerator import package

CELL = 128
COUNT = 8  # captions of each split


def run(emit: Callable, what: str, data: str, directory: str, output: str, tiny: bool) -> None:
    """`what` "prompts": writes captions to DIRECTORY/prompts.txt; "sheet": writes OUTPUT."""
    count = 2 if tiny else COUNT
    captions = {split: chosen(data, split, count) for split in ("train", "heldout")}
    if what == "prompts":
        texts = captions["train"] + captions["heldout"]
        (Path(directory) / "prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        emit("captions", **captions)
        return
    labels = {"train": "training", "heldout": "held out"}
    titles = [f"{labels[split]}: {text}" for split, texts in captions.items() for text in texts]
    emit("sheet", pictures=sheet(titles, Path(directory), Path(output)))


def chosen(data: str, split: str, count: int) -> list[str]:
    """The first captions of images spread evenly over a split."""
    prepared = package.prepared(data)
    images, captions = prepared.images(split), prepared.captions()
    total = prepared.num_images(split)
    rows = [(2 * i + 1) * total // (2 * count) for i in range(count)]
    return [captions[images[row].caption_ids[0]].text for row in rows]


def sheet(titles: list[str], directory: Path, output: Path) -> int:
    """Writes the contact sheet of the pictures in a directory, in order; their number."""
    rows, sizes = [], []
    for i in range(len(titles)):
        files = sorted(directory.glob(f"{i:04d}_*.png"))
        images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        rows.append(sorted(images, key=len))
        sizes = [str(len(image)) for image in rows[-1]]
    pictures = package.pictures()
    pictures.write_png(output, pictures.contact_sheet(titles, rows, sizes, CELL))
    return len(rows)
