"""The data set that ships with the package: 3,391 emoji, 256x256, captioned, with a split that
tests composition.

`tools/build_emoji.py` makes it and documents the split; `assets/emoji/NOTICE` names its origins.
"""

import argparse
import importlib.resources

from imagen_jax.data.sources.source import SourceItem

USAGE = "emoji"


def open_source(name: str, args: argparse.Namespace) -> "EmojiSource":
    """The embedded set. Raises ValueError for a held-out fraction: it has a split of its own."""
    if args.heldout:
        raise ValueError("the emoji have their own held-out compositions: leave --heldout at 0")
    return EmojiSource()


class EmojiSource:
    """The embedded emoji as a source: items of `train`, then those of `heldout`; the id is the
    emoji's hexcode.
    """

    def __init__(self):
        import tensorflow_datasets as tfds

        self._directory = importlib.resources.files("imagen_jax") / "assets" / "emoji"
        builder = tfds.builder_from_directory(str(self._directory))
        decoders = {"image": tfds.decode.SkipDecoding()}
        self._splits = [
            (name, builder.as_data_source(name, decoders=decoders)) for name in ("train", "heldout")
        ]

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self._splits)

    def __getitem__(self, index: int) -> SourceItem:
        """Item `index` as WebP bytes with two captions: the label in words; the label with
        keywords. IndexError past the end.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"the embedded data set has items 0 to {len(self) - 1}, not {index}")
        for _split, rows in self._splits:
            if index < len(rows):
                break
            index -= len(rows)
        row = rows[index]
        return SourceItem(
            id=row["id"].decode(),
            image=row["image"],
            captions=[c.decode() for c in row["captions"]],
            split=split,
        )

    def describe(self) -> dict:
        """What the manifest of a prepared directory records of its source."""
        return {
            "kind": "embedded",
            "name": "emoji",
            "images": {name: len(rows) for name, rows in self._splits},
        }
