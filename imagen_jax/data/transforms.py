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

from imagen_jax.data.views import CENTRE, Box, View, window
from imagen_jax.stage_sizes import Size

# glibc's mallopt: parameter and value in bytes. The second has the largest value allowed.
_MALLOPT = {-1: 256 << 20, -3: 32 << 20}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


def check_sizes(data_cfg: Mapping[str, Any]) -> None:
    """Raises ValueError if low-res size, crop size, buckets or view do not fit the image size."""
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
    low, high = data_cfg["view_scale"]
    if not 0 < low <= high <= 1:
        raise ValueError(
            f"data.view_scale = ({low:g}, {high:g}) is not a range in (0, 1]: give the smaller"
            " number first"
        )
    _check_buckets(data_cfg)


def _check_buckets(data_cfg: Mapping[str, Any]) -> None:
    buckets = [tuple(bucket) for bucket in data_cfg["buckets"]]
    if buckets and data_cfg["crop_size"]:
        raise ValueError(
            f"data.buckets and data.crop_size = {data_cfg['crop_size']} are both set: buckets are"
            " sizes of whole images; set data.crop_size = 0"
        )
    if len(set(buckets)) < len(buckets):
        raise ValueError(f"data.buckets = {tuple(buckets)} has a size twice: give each size once")
    size, lowres = data_cfg["image_size"], data_cfg["lowres_size"]
    for height, width in buckets:
        if min(height, width) < 1:
            raise ValueError(f"data.buckets has ({height}, {width}): give sides of 1 pixel or more")
        if any(side * lowres % size for side in (height, width)):
            raise ValueError(
                f"data.buckets has ({height}, {width}), whose low-res size is not whole: give sides"
                f" divisible by data.image_size / data.lowres_size, {size // lowres}"
            )


def decode_square(encoded: bytes, size: int, decode: str = "exact") -> UInt8[np.ndarray, "s s 3"]:
    """Decodes to RGB, cuts out the centre square and shrinks it to `size` pixels.

    decode: see `decode_window`.
    """
    return decode_window(encoded, (size, size), decode)


def decode_window(
    encoded: bytes, target: Size, decode: str = "exact", view: View = CENTRE
) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes to RGB, cuts out the window of `view` and shrinks it to `target`, height and width.

    decode: "exact", or "draft": libjpeg decodes a JPEG at the scale of `draft_factor`.
    """
    _keep_freed_memory()
    with Image.open(io.BytesIO(encoded)) as opened:
        full_size = opened.size
        box = window(full_size, target, view)
        factor = draft_factor(box, target) if decode == "draft" else 1
        if factor > 1 and opened.format == "JPEG":
            opened.draft(None, (min(full_size) // factor,) * 2)
        else:
            factor = 1
        opened.load()
        image = opened if opened.mode == "RGB" else opened.convert("RGB")  # convert() copies
    size = target[1], target[0]  # as Pillow counts
    if factor == 1:
        return np.asarray(image.crop(box).resize(size, Image.Resampling.BOX))
    # The same part of the scene. libjpeg rounds sizes up, so it may end inside a decoded pixel.
    scaled = tuple(edge / factor for edge in box)
    return np.asarray(image.resize(size, Image.Resampling.BOX, scaled))


@functools.cache
def _keep_freed_memory() -> None:
    """Lets glibc keep the memory of decoded images for the next ones.

    Otherwise it may return megabytes to the kernel after each image, which then zeroes them again:
    up to a third of the time of decoding. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, value in _MALLOPT.items() if mallopt else ():
        mallopt(parameter, value)


def draft_factor(box: Box, target: Size) -> int:
    """The factor 8, 4, 2 or 1 by which a decoder may shrink an image of which `box` is wanted.

    The largest one that leaves both sides of the box at least twice the target's, or a multiple of
    them with edges between decoded pixels. BOX counts pixels as a whole, which is coarse at other
    factors.

    box: the window in pixels of the whole image. target: height and width that it is shrunk to.
    """
    sides = (box[3] - box[1], target[0]), (box[2] - box[0], target[1])
    for factor in (8, 4, 2):
        whole = all(not side % (factor * wanted) for side, wanted in sides)
        aligned = whole and not any(edge % factor for edge in box)
        if aligned or all(side >= 2 * factor * wanted for side, wanted in sides):
            return factor
    return 1


def centre_square(image: Image.Image) -> Image.Image:
    """The largest square in the centre of an image."""
    return image.crop(window(image.size, (1, 1)))


def shrink(image: UInt8[np.ndarray, "h w 3"], size: int | Size) -> UInt8[np.ndarray, "r q 3"]:
    """Shrinks by area average to `size`, height and width or the side of a square.

    Returns an image of that size itself.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


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
