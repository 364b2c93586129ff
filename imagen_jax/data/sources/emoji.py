"""The embedded data set: 3,391 captioned emoji at 256x256; its split tests composition.

`tools/build_emoji.py` makes it and documents the split; `assets/emoji/NOTICE` names its origins.
"""

import importlib.resources
from collections.abc import Mapping
from typing import Any

from absl import flags

from imagen_jax.data.sources.source import SourceItem

USAGE = "emoji"


def open_source(name: str, args: flags.FlagValues) -> "EmojiSource":
    """Opens the embedded set. Raises ValueError for --heldout: the set has its own split."""
    if args.heldout:
        raise ValueError("the emoji have their own held-out compositions: leave --heldout at 0")
    return EmojiSource()


class EmojiSource:
    """The embedded emoji: the items of `train`, then those of `heldout`.

    The id of an item is the emoji's hexcode.
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
        """Returns an item: WebP bytes and two captions, the label in words and with keywords.

        Raises:
          IndexError: there is no such item.
        """
        start = 0
        for split, rows in self._splits:
            if start <= index < start + len(rows):
                return _item(rows[index - start], split)
            start += len(rows)
        raise IndexError(f"the embedded data set has items 0 to {start - 1}, not {index}")

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "embedded",
            "name": "emoji",
            "images": {name: len(rows) for name, rows in self._splits},
        }

    def notes(self) -> list[dict[str, Any]]:
        return []


def _item(row: Mapping[str, Any], split: str) -> SourceItem:
    captions = [caption.decode() for caption in row["captions"]]
    return SourceItem(row["id"].decode(), row["image"], captions, split)
