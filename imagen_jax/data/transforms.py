"""From encoded bytes to the arrays of one example: decode, square, shrink, crop, low-res pair,
padded text.

Shrinking is PIL's BOX filter (the area average), so that the low-res picture a super-resolution
stage trains on is the picture the stage before it learns to draw.
"""

import io
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Bool, UInt8
from PIL import Image


def check_sizes(data_cfg: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line, for sizes that cannot be cut from one another."""
    size, lowres, crop = data_cfg["image_size"], data_cfg["lowres_size"], data_cfg["crop_size"]
    if lowres and size % lowres:
        raise ValueError(f"data.image_size={size} is not a multiple of data.lowres_size={lowres}")
    if crop > size:
        raise ValueError(f"data.crop_size={crop} is larger than data.image_size={size}")
    if lowres and crop % (size // lowres):
        raise ValueError(
            f"data.crop_size={crop} is not a whole number of low-res pixels of {size // lowres}"
            " pixels each"
        )


def decode_square(encoded: bytes, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Decode to RGB, keep the centre square, shrink it to `size` pixels."""
    with Image.open(io.BytesIO(encoded)) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def shrink(image: UInt8[np.ndarray, "s s 3"], size: int) -> UInt8[np.ndarray, "r r 3"]:
    """Area average down to `size` pixels square."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))


def crop_pair(
    image: UInt8[np.ndarray, "s s 3"], lowres_size: int, crop_size: int, place: tuple[float, float]
) -> tuple[UInt8[np.ndarray, "c c 3"], UInt8[np.ndarray, "k k 3"]]:
    """The low-res picture of the whole image, and the same window cut out of both.

    The window starts on a low-res pixel, so both crops show exactly the same part of the scene.

    Args:
      image: the whole target image, s a multiple of lowres_size.
      lowres_size: side r of the whole low-res image.
      crop_size: side c of the window in target pixels, a multiple of s / r; s for no crop.
      place: row and column of the window as fractions in [0, 1) of all places it can have.
    """
    factor = image.shape[0] // lowres_size
    lowres = shrink(image, lowres_size)
    window = crop_size // factor
    row, column = (int(fraction * (lowres_size - window + 1)) for fraction in place)
    small = lowres[row : row + window, column : column + window]
    row, column = row * factor, column * factor
    return image[row : row + crop_size, column : column + crop_size], small


def pad_text(
    embedding: BFloat16[np.ndarray, "n d"], length: int
) -> tuple[BFloat16[np.ndarray, "l d"], Bool[np.ndarray, " l"]]:
    """Token features padded with zeros to `length` tokens, and the mask of the real ones. n must
    not exceed `length`.
    """
    tokens, dim = embedding.shape
    if tokens > length:
        raise ValueError(f"a caption has {tokens} tokens, more than the text length {length}")
    text = np.zeros((length, dim), ml_dtypes.bfloat16)
    text[:tokens] = embedding
    return text, np.arange(length) < tokens
