"""Pictures for people: grids of images, contact sheets with captions, PNG files written whole or
not at all.
"""

import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from imagen_jax.storage import write_atomically

Picture = UInt8[np.ndarray, "_ _ 3"]  # each of its own height and width
GAP = 4
INK = (20, 20, 20)


def enlarge(image: Picture, size: int) -> Picture:
    """Nearest-neighbour to `size` pixels high: small samples shown as they are, not smoothed."""
    width = round(image.shape[1] * size / image.shape[0])
    return np.asarray(Image.fromarray(image).resize((width, size), Image.Resampling.NEAREST))


def grid(rows: Sequence[Sequence[Picture]], cell: int) -> Picture:
    """Rows of square images, each enlarged to `cell` pixels, on white."""
    height, width = len(rows), max(len(row) for row in rows)
    canvas = np.full((height * (cell + GAP) + GAP, width * (cell + GAP) + GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = GAP + i * (cell + GAP), GAP + j * (cell + GAP)
            canvas[top : top + cell, left : left + cell] = enlarge(image, cell)
    return canvas


def contact_sheet(
    captions: Sequence[str], rows: Sequence[Sequence[Picture]], headings: Sequence[str], cell: int
) -> Picture:
    """A table: a caption, then its images side by side under `headings`."""
    font = ImageFont.load_default(size=max(11, cell // 8))
    text_width, line = 2 * cell, int(1.3 * max(11, cell // 8))
    body = grid(rows, cell)
    sheet = Image.new("RGB", (text_width + body.shape[1], line + GAP + body.shape[0]), "white")
    sheet.paste(Image.fromarray(body), (text_width, line + GAP))
    draw = ImageDraw.Draw(sheet)
    for j, heading in enumerate(headings):
        draw.text((text_width + GAP + j * (cell + GAP), GAP), heading, INK, font)
    characters = max(8, int(text_width / (0.55 * max(11, cell // 8))))
    for i, caption in enumerate(captions):
        wrapped = "\n".join(textwrap.wrap(caption, characters)[: max(1, cell // line)])
        draw.text((GAP, line + 2 * GAP + i * (cell + GAP)), wrapped, INK, font)
    return np.asarray(sheet)


def figure_png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def png_bytes(image: Picture) -> bytes:
    """The image as a PNG file's content."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(path: str | os.PathLike, image: Picture) -> Path:
    """Writes a PNG under its final name only when it is whole."""
    path = Path(path)
    write_atomically(path, png_bytes(image))
    return path
