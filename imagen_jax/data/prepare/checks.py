"""Checks one image with its captions, and returns the bytes to store for it."""

import dataclasses
import hashlib

from PIL import Image

from imagen_jax import caption_text
from imagen_jax.data.prepare.resize import AS_IS, Resize
from imagen_jax.data.prepare.upright import upright
from imagen_jax.data.sources.source import SourceItem


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """The result for one item of a source.

    captions: the usable captions, cleaned.
    bad_captions: for each unusable caption, the reason.
    removed: for each usable caption, a note on the removed characters, or "".
    reason: the reason why the item is unusable; "" if it is usable.
    content: hash of the file, to detect a source that changes between two passes.
    pixels: hash of the decoded picture and its size, equal for equal pictures.
    height, width: of the image as stored, in pixels.
    size: bytes to be stored.
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
    removed: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        lists = (self.captions, self.bad_captions, self.removed)
        texts = (self.id, self.split, self.reason, self.detail, self.content, self.pixels)
        if not all(isinstance(x, list) for x in lists) or not all(
            isinstance(x, str) for x in texts
        ):
            raise TypeError(f"the check of {self.id!r:.40} has a field of another type")


def check(item: SourceItem, min_size: int, resize: Resize = AS_IS) -> Checked:
    """Decodes an item completely; refuses images less than `min_size` pixels across.

    `min_size` and the hash of the pixels refer to the image before it is resized.

    A damaged item costs only itself: every error of the decoder is a reason, not an exception.
    """
    captions, removed, bad = usable_captions(item.captions)
    content = content_hash(item.image or b"")
    checked = Checked(item.id, item.split, captions, bad, "", content=content, removed=removed)
    refuse = lambda reason, detail="": dataclasses.replace(checked, reason=reason, detail=detail)
    if item.fault:
        return refuse(*item.fault)
    if item.image is None:
        return refuse("missing_image")
    try:
        image, stored = upright(item.image, resize)
    except ValueError as error:
        return refuse("broken_image", str(error))
    width, height = resize.stored_size(image.size)
    checked = dataclasses.replace(
        checked,
        pixels=_pixel_hash(image),
        height=height,
        width=width,
        size=len(stored),
    )
    if min(image.size) < min_size:
        return refuse("small_image", f"{image.width}x{image.height}")
    return checked if captions else refuse("no_caption")


def usable_captions(captions: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Returns the cleaned captions, notes on what was removed, and reasons for the unusable ones.

    The notes are in the order of the captions, "" where nothing was removed; the list is empty if
    all are.
    """
    usable, notes, bad = [], [], []
    for caption in captions:
        text, note = caption_text.clean(caption)
        if not text:
            bad.append("empty_caption")
        elif not caption_text.is_text(text):
            bad.append("invalid_caption")
        else:
            usable.append(text)
            notes.append(note)
    return usable, notes if any(notes) else [], bad


def _pixel_hash(image: Image.Image) -> str:
    return content_hash(f"{image.width}x{image.height}:".encode() + image.tobytes())


def content_hash(data: bytes) -> str:
    """Identity of a file's content: 128 bits in hexadecimal."""
    return hashlib.sha256(data).hexdigest()[:32]


def stored_bytes(data: bytes, resize: Resize = AS_IS) -> bytes:
    """Returns the bytes to store for an image file, see `upright`."""
    return upright(data, resize)[1]
