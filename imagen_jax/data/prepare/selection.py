"""Selects the images and captions to keep, and their order, once all of them are checked."""

import dataclasses
from collections import Counter
from collections.abc import Iterable

from imagen_jax.data.prepare.checks import Checked
from imagen_jax.data.records import SPLITS


@dataclasses.dataclass(slots=True)
class KeptImage:
    """An image to be stored: its index in the source, its check, its caption ids."""

    index: int
    checked: Checked
    caption_ids: list[int]


@dataclasses.dataclass
class Selection:
    """The result of `select`.

    images: the kept images by split, in the source's order. captions: the distinct captions by id.
    skipped: the lines of skipped.jsonl, each with an id and a reason.
    """

    images: dict[str, list[KeptImage]]
    captions: list[str]
    skipped: list[dict]

    def reasons(self) -> dict[str, int]:
        """The number of files, items or captions that `skipped` lists under each reason."""
        counts: Counter[str] = Counter()
        for line in self.skipped:
            counts[line["reason"]] += line.get("count", 1)
        return dict(sorted(counts.items()))

    def examples(self) -> str:
        """One item of each reason, for a message: "such as missing_image: a.png"."""
        first = {line["reason"]: line for line in reversed(self.skipped)}
        names = {reason: line.get("files", [line["id"]])[0] for reason, line in first.items()}
        return f"such as {', '.join(f'{reason}: {names[reason]}' for reason in sorted(names)[:5])}"


def select(checked: Iterable[Checked]) -> Selection:
    """Selects images and captions; the result depends on the order of the source alone.

    Unusable images are skipped. A duplicate of an earlier image is skipped too: its captions go to
    the earlier image. If the earlier image is in the other split, the duplicate's captions are
    dropped, so that training uses no held-out picture or caption pair. A caption of several images
    is stored once and noted.
    """
    selected = Selection({split: [] for split in SPLITS}, [], [])
    by_pixels: dict[str, KeptImage] = {}
    first_use: dict[str, tuple[int, str]] = {}  # caption -> its id and the image that first had it
    for index, item in enumerate(checked):
        selected.skipped += _caption_notes(item)
        if item.reason:
            selected.skipped.append({"id": item.id, "reason": item.reason, "detail": item.detail})
            continue
        image = by_pixels.get(item.pixels)
        if image is None:
            image = by_pixels[item.pixels] = KeptImage(index, item, [])
            selected.images[item.split].append(image)
        elif not _merge(selected, image.checked, item):
            continue
        _add_captions(selected, image, item, first_use)
    return selected


def _caption_notes(item: Checked) -> list[dict]:
    bad = [{"id": item.id, "reason": reason} for reason in item.bad_captions]
    removed = [
        {"id": item.id, "reason": "removed_characters", "detail": note, "caption": caption}
        for caption, note in zip(item.captions, item.removed)
        if note
    ]
    return bad + removed


def _merge(selected: Selection, first: Checked, item: Checked) -> bool:
    """Notes a duplicate of `first`; returns whether its captions are used."""
    same_split = first.split == item.split
    reason = "duplicate_image" if same_split else "duplicate_image_in_other_split"
    line = {"id": item.id, "reason": reason, "of": first.id, "captions": item.captions}
    selected.skipped.append(line)
    return same_split


def _add_captions(
    selected: Selection, image: KeptImage, item: Checked, first_use: dict[str, tuple[int, str]]
) -> None:
    for caption in item.captions:
        if caption not in first_use:
            first_use[caption] = (len(selected.captions), item.id)
            selected.captions.append(caption)
        else:
            line = {
                "id": item.id,
                "reason": "duplicate_caption",
                "of": first_use[caption][1],
                "caption": caption,
            }
            selected.skipped.append(line)
        caption_id = first_use[caption][0]
        if caption_id not in image.caption_ids:
            image.caption_ids.append(caption_id)
