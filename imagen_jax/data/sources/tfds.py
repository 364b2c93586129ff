"""A TFDS dataset that is already on disk in the array_record format."""

from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from imagen_jax.data.sources.source import Fault, SourceItem, hashed_split
from imagen_jax.storage import COPY_AGAIN, check_local

USAGE = "tfds:NAME or tfds:DIR"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that choose a split and features of the dataset."""
    define = partial(flags.DEFINE_string, flag_values=values)
    define("tfds_dir", None, "for tfds:NAME: TFDS data directory")
    define("tfds_split", "train", "for tfds: split to read")
    define("tfds_image", "image", "for tfds: image feature")
    define("tfds_caption", "caption", "for tfds: caption feature, or a path such as captions/text")


def open_source(name: str, args: flags.FlagValues) -> "TfdsSource":
    """Opens the dataset `name`, or the one in the directory `name`."""
    return TfdsSource(
        name, args.tfds_dir, args.tfds_split, args.tfds_image, args.tfds_caption, args.heldout
    )


class TfdsSource:
    """A split of a TFDS dataset on disk in the ArrayRecord format; images stay encoded.

    `caption` may be a path such as captions/text; a sequence gives several captions.
    """

    def __init__(
        self, name: str, data_dir: str | None, split: str, image: str, caption: str, heldout: float
    ):
        import tensorflow_datasets as tfds

        for path in (name, data_dir or ""):
            check_local("the TFDS dataset", path)
        builder = _builder(name, data_dir)
        if split not in builder.info.splits:
            splits = (
                ", ".join(builder.info.splits)
                or "none: download_and_prepare it first, file_format='array_record'"
            )
            raise ValueError(f"tfds:{name} has no split {split!r} on disk (found {splits})")
        for feature in (image, caption):
            _check_feature(f"tfds:{name}", builder.info.features, feature)
        try:
            self._rows = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise ValueError(
                f"tfds:{name} is not in the array_record format, which random access needs"
            ) from error
        self._name = f"{builder.info.name}/{builder.info.version}"
        self._split, self._image, self._caption, self._heldout = split, image, caption, heldout

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> SourceItem:
        row = self._row(index)
        item_id = f"{self._split}-{index:09d}"
        captions = row
        for key in self._caption.split("/"):
            captions = captions[key]
        captions = [captions] if isinstance(captions, bytes | str) else list(captions)
        texts, fault = _decoded(captions)
        split = hashed_split(item_id, self._heldout)
        return SourceItem(item_id, row[self._image], texts, split, fault)

    def _row(self, index: int) -> Any:
        """Raises ValueError that names the dataset: a damaged shard is not one bad item."""
        try:
            return self._rows[index]
        except (OSError, MemoryError):
            raise
        except Exception as error:
            cause = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"{self._name}: row {index} cannot be read ({cause}); {COPY_AGAIN}"
            ) from error

    def describe(self) -> dict[str, Any]:
        features = {"image": self._image, "caption": self._caption}
        options = {"split": self._split, "heldout": self._heldout}
        return {"kind": "tfds", "name": self._name, "items": len(self)} | features | options

    def notes(self) -> list[dict[str, Any]]:
        return []


def _builder(name: str, data_dir: str | None) -> Any:
    """Opens the dataset. Raises ValueError if there is none or its metadata are damaged."""
    import tensorflow_datasets as tfds

    try:
        if (Path(name) / "dataset_info.json").is_file():
            return tfds.builder_from_directory(name)
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ModuleNotFoundError) as error:
        cause = str(error).partition("\n")[0]
        raise ValueError(
            f"tfds:{name} is not a TFDS dataset or a directory of one ({cause})"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"tfds:{name} cannot be opened ({cause}); {COPY_AGAIN}") from error


def _decoded(captions: list[Any]) -> tuple[list[str], Fault | None]:
    try:
        return [c.decode() if isinstance(c, bytes) else str(c) for c in captions], None
    except UnicodeDecodeError as error:
        return [], Fault("unreadable_captions", f"not UTF-8 text ({error.reason})")


def _check_feature(label: str, features: Any, path: str) -> None:
    inside = features
    for key in path.split("/"):
        inside = getattr(inside, "feature", inside)  # a Sequence holds the features of its items
        if not hasattr(inside, "keys") or key not in inside:
            raise ValueError(f"{label} has no feature {path!r} (it has {', '.join(features)})")
        inside = inside[key]
