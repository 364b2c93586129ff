"""Which part of an image is read: a window with the aspect ratio of the target size."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax.data.records import Prepared
from imagen_jax.stage_sizes import Size

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, as Pillow counts


@dataclasses.dataclass(frozen=True)
class View:
    """A window of an image, whatever its size.

    scale: side of the window, as a fraction of the largest window's.
    corner: row and column of its corner, as fractions in [0, 1) of their range; None: in the
        centre.
    """

    scale: float = 1.0
    corner: tuple[float, float] | None = None


CENTRE = View()
TOLERANCE = 1e-6  # pixels; of products such as 100 * 0.57, which is below 57


def drawn(data_cfg: Mapping[str, Any], draws: Sequence[float]) -> View:
    """The view of a training example, by data.view and data.view_scale.

    draws: three random numbers in [0, 1): scale, row, column.
    """
    scale, row, column = draws
    if data_cfg["view"] == "centre":
        return CENTRE
    if data_cfg["view"] == "short_side":
        return View(1.0, (row, column))
    low, high = data_cfg["view_scale"]
    return View(low + (high - low) * scale, (row, column))


def smallest_scale(data_cfg: Mapping[str, Any]) -> float:
    """The smallest `View.scale` in training."""
    return data_cfg["view_scale"][0] if data_cfg["view"] == "random_crop" else 1.0


def window(size: tuple[int, int], target: Size, view: View = CENTRE) -> Box:
    """The part of an image that becomes an image of size `target`.

    size: width and height of the whole image in pixels, in Pillow's order. An image that covers the
    target has a window that does, if view.scale times the largest window does.
    """
    share = view.scale * min(size[1] / target[0], size[0] / target[1])
    height, width = (
        min(whole, max(1, round(share * side)))
        for whole, side in zip((size[1], size[0]), target, strict=True)
    )
    room = size[1] - height, size[0] - width
    if view.corner is None:
        top, left = room[0] // 2, room[1] // 2
    else:
        top, left = (int(part * (more + 1)) for part, more in zip(view.corner, room, strict=True))
    return left, top, left + width, top + height


def check_squares(prepared: Prepared, data_cfg: Mapping[str, Any]) -> None:
    """Raises ValueError if a square view of some image is smaller than data.image_size."""
    size, scale = data_cfg["image_size"], smallest_scale(data_cfg)
    smallest = prepared.manifest["image_sizes"]["min_side"]
    if scale == 1.0 or smallest * scale >= size - TOLERANCE:
        prepared.check_image_size(size)
        return
    needed = math.ceil(size / scale - TOLERANCE)
    raise ValueError(
        f"{prepared.path} has images with a side of only {smallest} pixels, but windows of"
        f" data.view_scale[0] = {scale:g} need {needed} for data.image_size = {size}: raise"
        f" data.view_scale[0], or prepare with --min_size {needed}"
    )
