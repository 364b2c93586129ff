"""Turns encoded bytes into the arrays of one example.

Shrinking uses PIL's BOX filter, the area average. So the low-res picture that a super-resolution
stage trains on is the picture that the stage before it learns to generate.
"""

import ctypes
import functools
import io
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Bool, UInt8
from PIL import Image

# glibc's mallopt: parameter and value in bytes. The second has the largest value allowed.
_MALLOPT = {-1: 256 << 20, -3: 32 << 20}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


def check_sizes(data_cfg: Mapping[str, Any]) -> None:
    """Raises ValueError if low-res size or crop size does not fit the image size."""
    size, lowres, crop = data_cfg["image_size"], data_cfg["lowres_size"], data_cfg["crop_size"]
    if lowres and size % lowres:
        raise ValueError(f"data.image_size={size} is not a multiple of data.lowres_size={lowres}")
    if crop > size:
        raise ValueError(f"data.crop_size={crop} is larger than data.image_size={size}")
    if lowres and crop % (size // lowres):
        raise ValueError(
            f"data.crop_size={crop} is not a multiple of data.image_size / data.lowres_size,"
            f" {size // lowres}"
        )


def decode_square(encoded: bytes, size: int, decode: str = "exact") -> UInt8[np.ndarray, "s s 3"]:
    """Decodes to RGB, cuts out the centre square and shrinks it to `size` pixels.

    decode: "exact", or "draft": libjpeg decodes a JPEG at the scale of `draft_factor`.
    """
    _keep_freed_memory()
    with Image.open(io.BytesIO(encoded)) as opened:
        full_size = opened.size
        factor = draft_factor(full_size, size) if decode == "draft" else 1
        if factor > 1 and opened.format == "JPEG":
            opened.draft(None, (min(full_size) // factor,) * 2)
        else:
            factor = 1
        opened.load()
        image = opened if opened.mode == "RGB" else opened.convert("RGB")  # convert() copies
    if factor == 1:
        square = centre_square(image)
        return np.asarray(square.resize((size, size), Image.Resampling.BOX))
    # The same part of the scene. libjpeg rounds sizes up, so it may end inside a decoded pixel.
    box = tuple(edge / factor for edge in _centre_box(full_size))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX, box))


@functools.cache
def _keep_freed_memory() -> None:
    """Lets glibc keep the memory of decoded images for the next ones.

    Otherwise it may return megabytes to the kernel after each image, which then zeroes them again:
    up to a third of the time of decoding. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, value in _MALLOPT.items() if mallopt else ():
        mallopt(parameter, value)


def draft_factor(full_size: tuple[int, int], size: int) -> int:
    """The factor 8, 4, 2 or 1 by which a decoder may shrink an image to be shrunk to `size` pixels.

    The largest one that leaves the centre square at least twice `size`, or a multiple of it with
    edges between decoded pixels. BOX counts pixels as a whole, which is coarse at other factors.

    full_size: width and height of the image in pixels.
    """
    side, box = min(full_size), _centre_box(full_size)
    for factor in (8, 4, 2):
        aligned = not side % (factor * size) and not any(edge % factor for edge in box)
        if aligned or side >= 2 * factor * size:
            return factor
    return 1


def centre_square(image: Image.Image) -> Image.Image:
    """The largest square in the centre of an image."""
    return image.crop(_centre_box(image.size))


def _centre_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the largest square in the centre of an image."""
    side = min(size)
    left, top = ((length - side) // 2 for length in size)
    return left, top, left + side, top + side


def shrink(image: UInt8[np.ndarray, "s s 3"], size: int) -> UInt8[np.ndarray, "r r 3"]:
    """Shrinks to `size` pixels square by area average; returns an image of that size itself."""
    if image.shape[0] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))


def crop_pair(
    image: UInt8[np.ndarray, "s s 3"], lowres_size: int, crop_size: int, corner: tuple[float, float]
) -> tuple[UInt8[np.ndarray, "c c 3"], UInt8[np.ndarray, "k k 3"]]:
    """Cuts the same window out of an image and out of its low-res version.

    The window starts on a low-res pixel, so both crops show exactly the same part of the scene.

    Args:
      image: the whole target image, s a multiple of lowres_size.
      lowres_size: side r of the whole low-res image.
      crop_size: side c of the window in target pixels, a multiple of s / r; s for no crop.
      corner: row and column of the window's corner, as fractions in [0, 1) of their range.

    Returns:
      The crop of the image, and that of the low-res image, whose side is k = c r / s.
    """
    factor = image.shape[0] // lowres_size
    lowres = shrink(image, lowres_size)
    window = crop_size // factor
    row, column = (int(fraction * (lowres_size - window + 1)) for fraction in corner)
    small = lowres[row : row + window, column : column + window]
    row, column = row * factor, column * factor
    return image[row : row + crop_size, column : column + crop_size], small


def pad_text(
    embedding: BFloat16[np.ndarray, "n d"], length: int
) -> tuple[BFloat16[np.ndarray, "l d"], Bool[np.ndarray, " l"]]:
    """Pads token features with zeros to `length` tokens; returns them with the mask of real ones.

    Raises:
      ValueError: n is larger than `length`.
    """
    tokens, dim = embedding.shape
    if tokens > length:
        raise ValueError(f"a caption has {tokens} tokens, more than the text length {length}")
    text = np.zeros((length, dim), ml_dtypes.bfloat16)
    text[:tokens] = embedding
    return text, np.arange(length) < tokens
