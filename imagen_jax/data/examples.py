"""The arrays of one example, from the row of its image."""

import dataclasses
import threading
from collections.abc import Hashable, Mapping
from typing import Any

import grain
import numpy as np
from jaxtyping import Shaped, UInt8

from imagen_jax.data import transforms, views
from imagen_jax.data.buckets import Bucket
from imagen_jax.data.example_text import TextOf
from imagen_jax.data.records import ImageStore
from imagen_jax.data.views import CENTRE, View
from imagen_jax.stage_sizes import Size

Example = dict[str, Shaped[np.ndarray | np.generic, "..."]]  # one row of a batch
Pixels = UInt8[np.ndarray, "h w 3"]
MIDDLE = (0.5, 0.5)


class PixelCache:
    """Cache of decoded images at the stage's size and their caption ids, limited in bytes.

    It never evicts: in a shuffled epoch every image is equally likely to be needed next. A pickled
    copy, in a worker process, starts empty.
    """

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._used = 0
        self._rows: dict[Hashable, tuple[Pixels, tuple[int, ...]]] = {}

    def __reduce__(self):
        return PixelCache, (self._limit,)

    def get(self, key: Hashable) -> tuple[Pixels, tuple[int, ...]] | None:
        """The image of a key and its caption ids, if they are kept."""
        return self._rows.get(key)

    def put(self, key: Hashable, pixels: Pixels, caption_ids: tuple[int, ...]) -> None:
        """Keeps them if there is room."""
        with self._lock:
            if key not in self._rows and self._used + pixels.nbytes <= self._limit:
                self._used += pixels.nbytes
                self._rows[key] = (pixels, caption_ids)


@dataclasses.dataclass(frozen=True)
class Examples(grain.transforms.RandomMap):
    """Maps a number to the arrays of one example.

    images, text_of: of one set; text_of maps a caption id to the text fields.
    config: the complete config section `data`.
    target: height and width of whole images.
    cache: shared by all Examples of a reader; only views in the centre are kept.
    set: position of the set in a mixture; None without a mixture.
    bucket: the numbers count the images of this bucket; None: they are rows of the image store.
    """

    images: ImageStore
    text_of: TextOf
    config: Mapping[str, Any]
    target: Size
    cache: PixelCache
    set: int | None = None
    bucket: Bucket | None = None

    def random_map(self, number: int, rng: np.random.Generator) -> Example:
        """The training example of a number, with random choices from `rng`."""
        # All are always drawn, so that disabling one choice does not change the others.
        caption, top, left, mirror, *placed = rng.random(7).tolist()
        return self.make(
            self.bucket.row(number) if self.bucket else number,
            caption if self.config["caption"] == "random" else 0.0,
            (top, left),
            self.config["flip"] and mirror < 0.5,
            views.drawn(self.config, placed),
        )

    def make(
        self,
        row: int,
        caption: float,
        corner: tuple[float, float],
        mirror: bool,
        view: View = CENTRE,
    ) -> Example:
        """Returns one example.

        row: of the image store.
        caption: position among the image's captions, as a fraction in [0, 1).
        corner: position of the crop, as fractions in [0, 1).
        """
        whole_image, caption_ids = self._whole_image(row, view)
        caption_id = caption_ids[int(caption * len(caption_ids))]
        example = {
            **self.text_of(caption_id),
            "index": np.int64(row),
            "caption_id": np.int64(caption_id),
        }
        if self.set is not None:
            example["set"] = np.int64(self.set)
        for name, pixels in self._crop_with_lowres(whole_image, corner).items():
            example[name] = np.ascontiguousarray(pixels[:, ::-1] if mirror else pixels)
        return example

    def image(self, row: int) -> Pixels:
        """The image as in `pipeline.eval_rows`: cropped at the centre, not mirrored."""
        return self._crop_with_lowres(self._whole_image(row, CENTRE)[0], MIDDLE)["image"]

    def _crop_with_lowres(self, whole_image: Pixels, corner: tuple[float, float]) -> Example:
        size, low, crop = (self.config[f"{name}_size"] for name in ("image", "lowres", "crop"))
        if crop:
            image, lowres = transforms.crop_pair(whole_image, low or size, crop, corner)
        else:
            height, width = self.target
            image = whole_image
            lowres = (
                transforms.shrink(image, (height * low // size, width * low // size))
                if low
                else None
            )
        return {"image": image, "lowres": lowres} if low else {"image": image}

    def _whole_image(self, row: int, view: View) -> tuple[Pixels, tuple[int, ...]]:
        cached = self.cache.get((self.set, row)) if view is CENTRE else None
        if cached is not None:
            return cached
        stored = self.images[row]
        if self.bucket:
            self.bucket.check(row, stored)
        pixels = transforms.decode_window(stored.image, self.target, self.config["decode"], view)
        if view is CENTRE:
            self.cache.put((self.set, row), pixels, stored.caption_ids)
        return pixels, stored.caption_ids
