"""Which images and captions of a source are kept, in which order: decided once all of them have
been checked.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable

from imagen_jax.data.prepare.checks import Checked
from imagen_jax.data.records import SPLITS


@dataclasses.dataclass(slots=True)
class KeptImage:
    """An image to be stored: its position in the source, what was found about it, its
    caption ids.
    """

    index: int
    checked: Checked
    caption_ids: list[int]


@dataclasses.dataclass
class Selection:
    """images: the kept images by split, in the source's order. captions: the distinct captions by
    id. skipped: one dictionary for everything left out or noted, each with id and reason.
    """

    images: dict[str, list[KeptImage]]
    captions: list[str]
    skipped: list[dict]

    def reasons(self) -> dict[str, int]:
        """How many lines of `skipped` there are of each reason."""
        return dict(sorted(Counter(line["reason"] for line in self.skipped).items()))


def select(checked: Iterable[Checked]) -> Selection:
    """Drop what cannot be used and what comes twice; the result depends on the order of the source
    alone.

    An image that equals an earlier one (same pixels) gives its captions to that one. If the earlier
    one is in the other split nothing of it is used, so that no held-out picture or caption pair is
    trained on. A caption that another image has too is stored once and noted.
    """
    selected = Selection({split: [] for split in SPLITS}, [], [])
    by_pixels: dict[str, KeptImage] = {}
    first_use: dict[str, tuple[int, str]] = {}  # caption -> its id and the image that first had it
    for index, found in enumerate(checked):
        selected.skipped.extend({"id": found.id, "reason": reason} for reason in found.bad_captions)
        if found.reason:
            selected.skipped.append(
                {"id": found.id, "reason": found.reason, "detail": found.detail}
            )
            continue
        image = by_pixels.get(found.pixels)
        if image is None:
            image = by_pixels[found.pixels] = KeptImage(index, found, [])
            selected.images[found.split].append(image)
        else:
            same_split = image.checked.split == found.split
            reason = "duplicate_image" if same_split else "duplicate_image_in_other_split"
            selected.skipped.append(
                {
                    "id": found.id,
                    "reason": reason,
                    "of": image.checked.id,
                    "captions": found.captions,
                }
            )
            if not same_split:
                continue
        _add_captions(selected, image, found, first_use)
    return selected


def _add_captions(
    selected: Selection, image: KeptImage, found: Checked, first_use: dict[str, tuple[int, str]]
) -> None:
    for caption in found.captions:
        if caption not in first_use:
            first_use[caption] = (len(selected.captions), found.id)
            selected.captions.append(caption)
        else:
            line = {
                "id": found.id,
                "reason": "duplicate_caption",
                "of": first_use[caption][1],
                "caption": caption,
            }
            selected.skipped.append(line)
        caption_id = first_use[caption][0]
        if caption_id not in image.caption_ids:
            image.caption_ids.append(caption_id)
