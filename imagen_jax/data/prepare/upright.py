"""Decodes an image file to the upright RGB picture that a viewer shows."""

import io
import re

import numpy as np
from PIL import Image

from imagen_jax.data.prepare.resize import AS_IS, Resize

# Formats that are stored unchanged if they hold one upright RGB picture; other files are rewritten
# as PNG, without loss.
_KEPT_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112  # the EXIF tag; its values:
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_XMP = b"XML:com.adobe.xmp\0"  # an iTXt chunk that may hold the orientation


def upright(data: bytes, resize: Resize = AS_IS) -> tuple[Image.Image, bytes]:
    """Returns the picture as RGB in its full size, and the bytes to store for it.

    The picture is turned as its EXIF data says, and is on white where it is transparent. The bytes
    to store are the resized picture if `resize` applies. Otherwise they are `data` if any reader
    decodes them to the same picture, else a PNG.

    Raises:
      ValueError: the file is no image that can be used, whatever the decoder raised.
    """
    try:
        image, is_plain, data = _decode(data)
        if resize.applies(image.size):
            return image, resize.encode(image)
        return image, data if is_plain else _png(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(first_line(error)) from error
    except Exception as error:  # struct.error, RuntimeError, KeyError ... on damaged files
        raise ValueError(f"{type(error).__name__}: {first_line(error)}") from error


def _decode(data: bytes) -> tuple[Image.Image, bool, bytes]:
    """Returns the picture, whether the file is that picture as it is, and the file.

    A PNG with more text than the decoder accepts is read without its text.
    """
    try:
        return *_rgb(data), data
    except ValueError:
        if not data.startswith(_PNG):
            raise
        textless = _without_text(data)
        if len(textless) == len(data):
            raise
        return *_rgb(textless), textless


def _rgb(data: bytes) -> tuple[Image.Image, bool]:
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        orientation = opened.getexif().get(_ORIENTATION, 1)
        is_plain = (
            opened.mode == "RGB"
            and opened.format in _KEPT_FORMATS
            and getattr(opened, "n_frames", 1) == 1
            and orientation == 1
            and "transparency" not in opened.info
        )
        method = _TO_UPRIGHT.get(orientation)
        # ImageOps.exif_transpose also writes the EXIF data anew, and fails on some that it reads.
        image = opened.copy() if method is None else opened.transpose(method)
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif "transparency" in image.info and data.startswith(_PNG):
        _scale_transparency(image, depth=data[24])
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = _on_white(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of kind {image.mode} have no known white")
    return image.convert("RGB"), is_plain


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture in 8 bits, white in its transparent colour; PIL would clip at 255."""
    values = np.asarray(image, np.uint32)
    grey = (values * 255 // 65535).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """Scales the transparent colour of a PNG as PIL scales its pixels, from `depth` to 8 bits."""
    if image.mode == "RGB" and depth == 16:
        raise ValueError("16-bit colour with a transparent colour: save it with an alpha channel")
    if image.mode == "L" and depth in (2, 4):
        image.info["transparency"] *= 255 // (2**depth - 1)


def _without_text(png: bytes) -> bytes:
    """The PNG without its text chunks, XMP excepted."""
    parts, start = [png[: len(_PNG)]], len(_PNG)
    while start + 12 <= len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        kind, content = png[start + 4 : start + 8], png[start + 8 : start + 8 + len(_XMP)]
        if kind not in _PNG_TEXT or content == _XMP:
            parts.append(png[start:end])
        start = end
    return b"".join(parts)


def first_line(error: Exception) -> str:
    """The first line of an error of PIL, or its type if it has none.

    Without the address of the object that PIL read, so that two passes say the same.
    """
    text = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error)).strip()
    return text.split("\n")[0] or type(error).__name__


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
