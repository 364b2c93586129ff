"""Sizes of images, (height, width) in pixels: buckets in training, --size in sampling.

A stage of image size s and low-res size r up-samples images of any height and width by s / r.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

Size = tuple[int, int]  # height, width


@runtime_checkable
class HasSizes(Protocol):
    """The fields of a `Stage` that its image sizes depend on."""

    name: str
    model: Any
    image_size: int
    lowres_size: int
    crop_size: int
    buckets: tuple[Size, ...]


def square(side: int) -> Size:
    """The size of a square image."""
    return side, side


def of_images(data_cfg: Mapping[str, Any]) -> tuple[Size, ...]:
    """The sizes in which images are read in training: data.buckets, or one square."""
    buckets = tuple((height, width) for height, width in data_cfg["buckets"])
    return buckets or (square(data_cfg["image_size"]),)


def of_training(data_cfg: Mapping[str, Any]) -> tuple[Size, ...]:
    """The sizes of training images: one square of data.crop_size, or those of whole images."""
    crop = data_cfg["crop_size"]
    return (square(crop),) if crop else of_images(data_cfg)


def size_text(size: Size) -> str:
    """A size as HEIGHTxWIDTH."""
    return f"{size[0]}x{size[1]}"


def short(size: Size) -> str:
    """The side of a square, HEIGHTxWIDTH of another size; part of file names and headings."""
    return str(size[0]) if size[0] == size[1] else size_text(size)


def parse(value: str) -> Size:
    """The size in HEIGHTxWIDTH, of --size. Raises ValueError for another text."""
    sides = value.split("x")
    if len(sides) != 2 or not all(s.isascii() and s.isdigit() and int(s) for s in sides):
        raise ValueError(f"--size {value} is not HEIGHTxWIDTH in pixels, such as 192x256")
    return int(sides[0]), int(sides[1])


def scaled(size: Size, to: int, of: int) -> Size:
    """`size` by the factor to / of, rounded down."""
    return size[0] * to // of, size[1] * to // of


def check_buckets(stage: HasSizes) -> None:
    """Raises ValueError, which names the bucket, if it does not fit the network of a stage.

    A mesh that splits the image height needs no other sizes: uneven parts are padded.
    `data.transforms.check_sizes` checks the rest.
    """
    factor = stage.model.factor
    for bucket in stage.buckets:
        if any(side % factor for side in bucket):
            raise ValueError(
                f"data.buckets has {size_text(bucket)}, but {stage.name} needs sides divisible by"
                f" {factor}, the factor by which its network shrinks images"
            )


def of_stages(stages: Sequence[HasSizes], size: Size | None) -> list[Size]:
    """The image size of each stage of a cascade, if the last one draws images of `size`.

    Without `size`, all stages draw squares of their image size. Raises ValueError, which names the
    nearest possible sizes, if the size of a stage is not whole or does not fit its network.
    """
    if size is None:
        return [square(stage.image_size) for stage in stages]
    step, last = step_of(stages), stages[-1].image_size
    if any(side % step for side in size):
        below = tuple(max(step, side - side % step) for side in size)
        above = tuple(side + -side % step for side in size)
        nearest = " and ".join(dict.fromkeys(map(size_text, (below, above))))
        raise ValueError(
            f"--size {size_text(size)} does not fit the stages {', '.join(s.name for s in stages)}:"
            f" height and width must be multiples of {step}, the nearest are {nearest}"
        )
    return [scaled(size, stage.image_size, last) for stage in stages]


def step_of(stages: Sequence[HasSizes]) -> int:
    """The number that the sides of the last stage's images must be multiples of.

    Then the images of every stage have whole sides that are divisible by its network's factor, and
    the low-res input of the first one has whole sides.
    """
    last, steps = stages[-1].image_size, [1]
    for stage in stages:
        # A side of the last stage is a side of this one times last / image_size.
        whole = stage.model.factor * last
        steps.append(whole // math.gcd(stage.image_size, whole))
    if low := stages[0].lowres_size:
        steps.append(last // math.gcd(low, last))
    return math.lcm(*steps)


def untrained(stages: Sequence[HasSizes], sizes: Sequence[Size]) -> str:
    """A line about the stages that were not trained on images of these sizes; "" for none.

    A stage that trains on crops never sees a whole image, so it is not named.
    """
    named = [
        f"{stage.name} ({size_text(size)}; trained on {', '.join(map(size_text, stage.buckets))})"
        for stage, size in zip(stages, sizes)
        if not stage.crop_size and size not in stage.buckets
    ]
    if not named:
        return ""
    return (
        f"not trained on images of the size that --size gives them: {', '.join(named)}; expect"
        " worse pictures, or give a size that they were trained on"
    )
