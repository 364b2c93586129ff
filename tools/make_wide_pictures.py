"""Makes a folder of captioned pictures from 1:3 to 3:1, to train with data.buckets without data.

    python -m tools.make_wide_pictures --output pictures --count 3000
    python -m imagen_jax.prepare_data --source folder:pictures --heldout 0.1 \
        --output data/wide --encoder t5_tiny --max_length 32

Each picture has one to three embedded emoji side by side or one above the other, on a plain light
background with random margins, so that ratios of the sides are continuous. The caption names them
in order. Files are PNGs, captions are in captions.jsonl.
"""

import argparse
import io
import json
import pathlib

import numpy as np
from PIL import Image

from imagen_jax.data.sources.emoji import EmojiSource

SIDE = 128  # of one emoji in pixels
LIMIT = 3.0  # largest ratio of the sides
WORDS = {False: " to the left of ", True: " above "}


def canvas(rng: np.random.Generator, count: int, upright: bool) -> tuple[int, int]:
    """A size (width, height) with room for `count` emoji in a row, or in a column if `upright`."""
    along, across = count * SIDE, SIDE
    along = int(along * rng.uniform(1.0, 1.3))
    across = int(across * rng.uniform(1.0, 1.5))
    along = min(along, int(LIMIT * across))  # the outer emoji are cut a little
    return (across, along) if upright else (along, across)


def picture(rng: np.random.Generator, emoji: list[Image.Image], upright: bool) -> Image.Image:
    """The emoji on a background, evenly spaced along the longer side."""
    width, height = canvas(rng, len(emoji), upright)
    colour = tuple(int(value) for value in rng.integers(200, 256, 3))
    image = Image.new("RGB", (width, height), colour)
    along, across = (height, width) if upright else (width, height)
    for i, one in enumerate(emoji):
        first = int((i + 0.5) * along / len(emoji)) - SIDE // 2
        second = (across - SIDE) // 2
        place = (second, first) if upright else (first, second)
        image.paste(one, place, one)
    return image


def opened(data: bytes) -> Image.Image:
    """An emoji with its white background made transparent."""
    with Image.open(io.BytesIO(data)) as file:
        image = file.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.array(image)
    pixels[..., 3] = np.where((pixels[..., :3] >= 250).all(axis=-1), 0, pixels[..., 3])
    return Image.fromarray(pixels)


def write(output: pathlib.Path, count: int, seed: int) -> None:
    """Writes `count` pictures and captions.jsonl to the new directory `output`."""
    source = EmojiSource()
    numbers = [i for i in range(len(source)) if source[i].split == "train"]
    output.mkdir(parents=True)
    lines = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        chosen = [source[int(n)] for n in rng.choice(numbers, rng.integers(1, 4), replace=False)]
        upright = bool(rng.integers(2))
        name = f"{i:06d}.png"
        picture(rng, [opened(item.image) for item in chosen], upright).save(output / name)
        caption = WORDS[upright].join(item.captions[0] for item in chosen)
        lines.append({"file": name, "captions": [caption]})
    (output / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=pathlib.Path, help="a new directory")
    parser.add_argument("--count", type=int, default=3000, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"--output {args.output} exists: give a new directory")
    write(args.output, args.count, args.seed)


if __name__ == "__main__":
    main()
