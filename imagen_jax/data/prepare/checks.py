"""What prepare_data finds out about one image, and the bytes it stores."""

import dataclasses
import hashlib
import io
import re

import numpy as np
from PIL import Image, ImageOps

from imagen_jax.data.sources.source import SourceItem

# Formats kept as they come when they hold one upright RGB picture; anything else is rewritten as
# PNG, without loss.
_KEPT_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112  # the EXIF tag


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """The result for one item of a source.

    reason: why it cannot be used, or "" if it can. content: hash of the file, to notice a source
    that changes between two passes. pixels: hash of the decoded picture and its size, equal for
    equal pictures. size: bytes to be stored. captions: those that can be used, without surrounding
    or repeated white space; bad_captions: why each other one cannot.
    """

    id: str
    split: str
    captions: list[str]
    bad_captions: list[str]
    reason: str
    detail: str = ""
    content: str = ""
    pixels: str = ""
    height: int = 0
    width: int = 0
    size: int = 0


def check(item: SourceItem, min_size: int) -> Checked:
    """Decode an item completely and say what it is worth; images under `min_size` pixels across are
    refused.
    """
    captions = [" ".join(caption.split()) for caption in item.captions]
    faults = [_fault(caption) for caption in captions]
    kept = [caption for caption, fault in zip(captions, faults, strict=True) if not fault]
    found = Checked(
        item.id,
        item.split,
        kept,
        list(filter(None, faults)),
        "",
        content=content_hash(item.image or b""),
    )
    if item.image is None:
        return dataclasses.replace(found, reason="missing_image")
    try:
        image, plain = upright_rgb(item.image)
        stored = item.image if plain else _png(image)
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # what PIL raises on bad files
        return dataclasses.replace(found, reason="broken_image", detail=_first_line(error))
    shape = {"height": image.height, "width": image.width, "size": len(stored)}
    digest = hashlib.sha256(
        f"{image.width}x{image.height}:".encode() + image.tobytes()
    ).hexdigest()[:32]
    found = dataclasses.replace(found, pixels=digest, **shape)
    if min(image.size) < min_size:
        return dataclasses.replace(
            found, reason="small_image", detail=f"{image.width}x{image.height}"
        )
    return found if kept else dataclasses.replace(found, reason="no_caption")


def _first_line(error: Exception) -> str:
    """Without the address of the object that PIL was reading, so that two passes say the same."""
    return re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error)).split("\n")[0]


def _fault(caption: str) -> str:
    if not caption:
        return "empty_caption"
    return "" if is_text(caption) else "invalid_caption"


def is_text(caption: str) -> bool:
    """Whether a caption can be written down."""
    try:
        caption.encode()
    except UnicodeEncodeError:  # a lone surrogate, as from "\\ud83d" in JSON
        return False
    return True


def content_hash(data: bytes) -> str:
    """Identity of a file's content, 128 bits in hexadecimal."""
    return hashlib.sha256(data).hexdigest()[:32]


def upright_rgb(data: bytes) -> tuple[Image.Image, bool]:
    """The picture as RGB, turned as its EXIF data says, on white where transparent; and whether the
    bytes were that already.
    """
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        plain = (
            opened.mode == "RGB"
            and opened.format in _KEPT_FORMATS
            and getattr(opened, "n_frames", 1) == 1
        )
        plain = (
            plain
            and opened.getexif().get(_ORIENTATION, 1) == 1
            and "transparency" not in opened.info
        )
        image = ImageOps.exif_transpose(opened)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    if image.mode.startswith("I;16"):  # PIL would cut all above 255 off
        image = Image.fromarray((np.asarray(image, np.uint32) * 255 // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of kind {image.mode} have no known white")
    return image.convert("RGB"), plain


def stored_bytes(data: bytes) -> bytes:
    """The bytes to store for an image file: its own if any reader decodes them to the same RGB
    picture, else a PNG.
    """
    image, plain = upright_rgb(data)
    return data if plain else _png(image)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
