"""Pictures for people: grids, contact sheets with captions, numbered PNG files."""

import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from imagen_jax.object_storage import AnyPath, bucket_errors, in_bucket
from imagen_jax.storage import entry_names, write_atomically

Picture = UInt8[np.ndarray, "_ _ 3"]  # each of its own height and width
GAP = 4
INK = (20, 20, 20)
# Files that hold a number: 0007_a_red_apple.png, its record 0007_a_red_apple.json, sheet_0007.png.
NUMBERED = re.compile(r"(?:sheet_(\d+)|(\d+)_.*)\.(?:png|json)")
CLAIM = re.compile(r"\.\d+\.claim")  # left by earlier versions


def enlarge(image: Picture, size: int) -> Picture:
    """Enlarges to `size` pixels high by nearest neighbour, so that nothing is smoothed."""
    width = round(image.shape[1] * size / image.shape[0])
    return np.asarray(Image.fromarray(image).resize((width, size), Image.Resampling.NEAREST))


def grid(rows: Sequence[Sequence[Picture]], cell: int) -> Picture:
    """Rows of images, each enlarged to `cell` pixels high, on white.

    A column is as wide as its widest image, so square images make square cells.
    """
    lefts = column_starts(rows, cell)
    canvas = np.full((len(rows) * (cell + GAP) + GAP, lefts[-1], 3), 255, np.uint8)
    for i, row in enumerate(rows):
        top = GAP + i * (cell + GAP)
        for left, image in zip(lefts, row):
            shown = enlarge(image, cell)
            canvas[top : top + cell, left : left + shown.shape[1]] = shown
    return canvas


def column_starts(rows: Sequence[Sequence[Picture]], cell: int) -> list[int]:
    """The left edge of each column of a grid in pixels, and at last the width of the grid."""
    lefts = [GAP]
    for column in range(max(len(row) for row in rows)):
        shapes = [row[column].shape for row in rows if column < len(row)]
        widest = max(round(width * cell / height) for height, width, _ in shapes)
        lefts.append(lefts[-1] + widest + GAP)
    return lefts


def contact_sheet(
    captions: Sequence[str], rows: Sequence[Sequence[Picture]], headings: Sequence[str], cell: int
) -> Picture:
    """A table with one row per caption: the caption, then its images under `headings`."""
    size = max(11, cell // 8)
    font, text_width, line = ImageFont.load_default(size=size), 2 * cell, int(1.3 * size)
    body = grid(rows, cell)
    sheet = Image.new("RGB", (text_width + body.shape[1], line + GAP + body.shape[0]), "white")
    sheet.paste(Image.fromarray(body), (text_width, line + GAP))
    pen = ImageDraw.Draw(sheet)
    for left, heading in zip(column_starts(rows, cell), headings):
        pen.text((text_width + left, GAP), heading, INK, font)
    characters = max(8, int(text_width / (0.55 * size)))
    for i, caption in enumerate(captions):
        wrapped = "\n".join(textwrap.wrap(caption, characters)[: max(1, cell // line)])
        pen.text((GAP, line + 2 * GAP + i * (cell + GAP)), wrapped, INK, font)
    return np.asarray(sheet)


def figure_png(figure: Any) -> bytes:
    """A matplotlib figure as the content of a PNG file, 110 pixels per inch.

    The content does not depend on the version of matplotlib through its metadata.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def png_bytes(image: Picture) -> bytes:
    """An image as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(path: AnyPath, image: Picture) -> AnyPath:
    """Writes a PNG file, whole or not at all, and returns its path."""
    write_atomically(path, png_bytes(image))
    return path


def read_png(path: AnyPath, most: int = 0, content: bytes | None = None) -> Picture:
    """A picture, shrunk to at most `most` pixels high; 0: not shrunk.

    content: of the file, if it is read already. Raises ValueError, which names the file, if it is
    damaged.
    """
    if content is None and in_bucket(path):
        with bucket_errors(path):
            content = path.read_bytes()
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as file:
            image = file.convert("RGB")
    except Exception as error:  # PIL raises many kinds of exceptions for damaged files
        if isinstance(error, OSError) and error.errno:  # of the file system
            raise
        raise ValueError(
            f"{path} is damaged ({error}); delete it, then run the same command again"
        ) from error
    if most and image.height > most:
        image = image.resize((round(image.width * most / image.height), most))
    return np.asarray(image)


def numbers(directory: AnyPath) -> set[int]:
    """The numbers that pictures, records and contact sheets in a directory have."""
    matches = map(NUMBERED.fullmatch, entry_names(directory))
    return {int(match[1] or match[2]) for match in matches if match}


def remove_numbered(directory: Path) -> None:
    """Deletes the pictures, records, contact sheets and abandoned claims of a directory."""
    for path in list(directory.iterdir()) if directory.is_dir() else []:
        if NUMBERED.fullmatch(path.name) or CLAIM.fullmatch(path.name):
            path.unlink()
