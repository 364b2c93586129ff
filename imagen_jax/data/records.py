"""Prepared data on disk: an image store and stores of captions under one manifest.

    DIR/manifest.json   written last: the directory is complete if and only if it is there
    DIR/partial/        work files, until the directory is complete
    DIR/images/         splits train and heldout: image (encoded bytes), height and width as
                        stored, id, caption_ids
    DIR/images/sizes-SPLIT.npy   see data/image_sizes.py; the manifest does not list it
    DIR/captions/       split train: text, embedding [length d] without padding, in bfloat16 or,
                        with scale [length], in int8; length. A caption's id is its row
    DIR/first_records.json   see data/first_records.py; the manifest does not list it
    DIR/skipped.jsonl   one line for every skipped or changed item, with the reason

With named text encoders, or with texts alone, the data has format 3: the records in captions/ have
only the text, and each encoder has a store of its own, row by row as captions/:

    DIR/captions_NAME/  split train: embedding, length and scale as above; pooled [e] in bfloat16,
                        if the encoder has a pooled vector

The stores are ArrayRecord shards in TFDS directories. `tfds.builder_from_directory` opens them
after `import ml_dtypes`, which registers bfloat16 with NumPy. Nothing here imports TensorFlow.
imagen_jax/data/quantization.py describes int8 features; readers get them as bfloat16.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagen_jax.checksums import sha256_file
from imagen_jax.data import caption_records, first_records, shard_cache
from imagen_jax.data.caption_records import CaptionRow, canonical, serialize_caption
from imagen_jax.data.manifest_file import (
    INT8_FORMAT_VERSION,
    MANIFEST,
    NAMED_FORMAT_VERSION,
    check_present,
    read_manifest,
    verify_shards,
)
from imagen_jax.data.shard_cache import Place, ShardCache
from imagen_jax.data.shard_reader import ShardReader
from imagen_jax.data.text_checks import TextChecks
from imagen_jax.object_storage import AnyPath, check_bucket, file_state, in_bucket
from imagen_jax.storage import absolute, as_path, disk_errors, written_whole
from imagen_jax.text_inputs import TextFeatures, TextInput

EMBEDDINGS = ("bfloat16", "int8")  # dtypes of stored features
SPLITS = ("train", "heldout")
# group_size:1 allows random access to single records. Images are compressed already; zstd saves a
# fifth of the bytes of bfloat16 embeddings.
IMAGE_OPTIONS, CAPTION_OPTIONS = "group_size:1,uncompressed", "group_size:1,zstd:3"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclasses.dataclass(frozen=True)
class ImageRow:
    """One image: encoded bytes that PIL reads, size in pixels, the source's id, caption ids."""

    image: bytes
    height: int
    width: int
    id: str
    caption_ids: tuple[int, ...]


@functools.cache
def image_features():
    """The TFDS features of the image store; the image stays encoded."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "height": np.int32,
            "width": np.int32,
            "id": tfds.features.Text(),
            "caption_ids": tfds.features.Sequence(np.int64),
        }
    )


@functools.cache
def import_tfds() -> None:
    """Makes TFDS import everything that reading needs, by reading a record of each kind.

    Call this before any thread reads. TFDS imports its modules on first use, and two threads that
    import at the same time can deadlock.
    """
    import io

    import ml_dtypes
    from PIL import Image

    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    parse_image(serialize_image(ImageRow(pixel.getvalue(), 1, 1, "", (0,))))
    empty = CaptionRow("", np.zeros((1, 1), ml_dtypes.bfloat16))
    caption_records.parse_caption(serialize_caption(empty), 1)


def serialize_image(row: ImageRow) -> bytes:
    """Returns the record of an image."""
    return canonical(image_features().serialize_example(dataclasses.asdict(row)))


def parse_image(record: bytes) -> ImageRow:
    """Inverse of `serialize_image`; the image stays encoded."""
    import tensorflow_datasets as tfds

    example = image_features().deserialize_example_np(
        record, decoders={"image": tfds.decode.SkipDecoding()}
    )
    caption_ids = tuple(int(i) for i in example["caption_ids"])
    return ImageRow(
        example["image"],
        int(example["height"]),
        int(example["width"]),
        example["id"].decode(),
        caption_ids,
    )


def caption_store(name: str) -> str:
    """The store of the features of a text encoder; "": that of texts, or of all in one."""
    return f"captions_{name}" if name else "captions"


def shard_name(store: str, split: str, index: int, count: int) -> str:
    """Path, relative to the prepared directory, of shard `index` of `count`."""
    return f"{store}/{store}-{split}.array_record-{index:05d}-of-{count:05d}"


def write_shard(root: AnyPath, name: str, records: Iterable[bytes]) -> dict:
    """Writes the ArrayRecord shard `root/name` atomically; in a bucket, on a local disk first.

    The bytes depend on the records alone.

    Returns:
      The shard's entry for the manifest: rows, bytes, sha256.

    Raises:
      OSError: the file cannot be written, for example because the disk is full.
    """
    from array_record.python import array_record_module

    options = IMAGE_OPTIONS if name.startswith("images/") else CAPTION_OPTIONS
    with written_whole(root / name) as writing:
        with disk_errors(writing):
            writer = array_record_module.ArrayRecordWriter(str(writing), options)
        rows = 0
        for record in records:
            with disk_errors(writing):
                writer.write(record)
            rows += 1
        with disk_errors(writing):
            writer.close()
        return {"rows": rows, "bytes": writing.stat().st_size, "sha256": sha256_file(writing)}


def write_tfds_metadata(root: Path, store: str, features, shards: Mapping[str, Mapping]) -> None:
    """Writes the metadata with which `tfds.builder_from_directory(root/store)` opens the shards."""
    import tensorflow_datasets as tfds

    directory = root / store
    infos = []
    for split in SPLITS:
        entries = [
            entry
            for name, entry in sorted(shards.items())
            if name.startswith(f"{store}/{store}-{split}.")
        ]
        if entries:
            template = tfds.core.ShardedFileTemplate(
                dataset_name=store,
                split=split,
                data_dir=directory,
                filetype_suffix="array_record",
                template=_TEMPLATE,
            )
            lengths = [entry["rows"] for entry in entries]
            size = sum(entry["bytes"] for entry in entries)
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
                )
            )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=infos,
        check_data=False,
        filename_template=_TEMPLATE,
    )


class _Store(ShardReader):
    """The records of one split; picklable, safe to share between threads."""

    def __init__(self, prepared: "Prepared", store: str, split: str):
        label, entries = f"{prepared.path}/{store} ({split})", prepared.entries(store, split)
        super().__init__(label, prepared.path, entries, prepared.first_sums, prepared.shard_cache)
        import_tfds()

    def __setstate__(self, state: Mapping) -> None:
        super().__setstate__(state)
        import_tfds()  # in a data worker, before it starts its reading threads


class ImageStore(_Store):
    """Images of one split by row."""

    def __getitem__(self, row: int) -> ImageRow:
        return parse_image(self.record(row))


class CaptionStore(_Store):
    """Captions by caption id; with features if the data has those of one unnamed encoder."""

    def __init__(self, prepared: "Prepared", dim: int):
        """dim: width of the token features, 0 without features."""
        super().__init__(prepared, caption_store(""), "train")
        self._dim, self._embedding = dim, prepared.embedding

    def __getitem__(self, caption_id: int) -> CaptionRow:
        return caption_records.parse_caption(self.record(caption_id), self._dim, self._embedding)

    def text(self, caption_id: int) -> str:
        """The text of a caption, without decoding its features."""
        return caption_records.parse_text(self.record(caption_id))


class FeatureStore(_Store):
    """The features of one text encoder by caption id."""

    def __init__(self, prepared: "Prepared", name: str):
        """name: of the encoder, "" for an unnamed one."""
        super().__init__(prepared, caption_store(name), "train")
        identity = prepared.encoders[name]
        pooled_dim = identity.get("pooled_dim", 0) if name else 0
        self._format = identity["dim"], prepared.embedding, pooled_dim

    def __getitem__(self, caption_id: int) -> TextFeatures:
        return caption_records.parse_features(self.record(caption_id), *self._format)


class Prepared:
    """An open prepared directory: manifest and stores. `open_once` opens it once per process.

    Opening reads the manifest and lists two directories: on a mounted object store one request per
    1,000 names, where a stat of each shard would be one request per shard. Size and first record of
    a shard are compared when it is first read.

    Raises ValueError if the directory is missing, incomplete or of another format version.
    `verify` also compares the content of all shards.

    shard_cache: copies the shards of a directory in a bucket; None for a local one.
    """

    def __init__(self, path: str | os.PathLike, place: Place = Place()):
        """place: where shards of a bucket are copied to."""
        self.path = as_path("prepared data", path)
        check_bucket("prepared data", self.path)
        self.manifest = read_manifest(self.path)
        check_present(self.path, self.manifest["shards"])
        self._stores: dict[str, _Store] = {}
        self.shard_cache: ShardCache | None = None
        if in_bucket(self.path):
            self.shard_cache = ShardCache(self.path, self.hash, place)
            shard_cache.check_shards(self.shard_cache, self.manifest["shards"])

    def entries(self, store: str, split: str = "train") -> dict[str, dict[str, Any]]:
        """{name: entry of the manifest} of the shards of a split of a store, in order."""
        start, shards = f"{store}/{store}-{split}.", self.manifest["shards"]
        return {name: shards[name] for name in sorted(shards) if name.startswith(start)}

    def entries_of_opened(self, split: str) -> dict[str, dict[str, Any]]:
        """`entries` of all stores that are open, of images only those of a split."""
        stores = [s for name, s in self._stores.items() if name == split or name not in SPLITS]
        return {name: self.manifest["shards"][name] for store in stores for name in store.names}

    @property
    def _is_named(self) -> bool:
        return self.manifest["format_version"] == NAMED_FORMAT_VERSION

    @property
    def hash(self) -> str:
        """Identity of the data: SHA-256 of the manifest, which holds the hash of every shard."""
        return self.manifest["hash"]

    @functools.cached_property
    def first_sums(self) -> dict[str, str]:
        """{shard: SHA-256 of its first record}; {} for data of earlier versions."""
        return first_records.read(self.path, self.hash)

    @property
    def encoders(self) -> dict[str, dict]:
        """{name: identity} of the text encoders whose features are stored.

        {"": identity} of a single unnamed one; {} if only the texts are stored.
        """
        return self.manifest["encoders"] if self._is_named else {"": self.manifest["encoder"]}

    @property
    def encoder(self) -> dict:
        """Identity of the unnamed text encoder. Raises ValueError if there is none."""
        self._texts.check_named("")
        return self.manifest["encoder"]

    @property
    def embedding(self) -> str:
        """The dtype of the stored token features; readers get bfloat16 in any case."""
        if self._is_named:
            return self.manifest["embedding_dtype"]
        return "int8" if self.manifest["format_version"] == INT8_FORMAT_VERSION else "bfloat16"

    @property
    def text_dim(self) -> int:
        """Width d of the unnamed encoder's features. Raises ValueError if there is none."""
        return self.encoder["dim"]

    @property
    def _texts(self) -> TextChecks:
        stats = self.manifest["embedding"] if self._is_named else {"": self.manifest["embedding"]}
        longest = {name: stats[name]["length"]["max"] for name in self.encoders}
        return TextChecks(self.path, self.encoders, longest)

    def num_images(self, split: str) -> int:
        """Number of images in a split."""
        return self.manifest["counts"]["images"][split]

    def images(self, split: str) -> ImageStore:
        """Opens the image store of a split. Raises ValueError if the split has no images."""
        if self.manifest["counts"]["images"].get(split, 0) == 0:
            raise ValueError(f"{self.path} has no images in split {split!r}")
        return self._once(split, lambda: ImageStore(self, "images", split))

    @property
    def evaluation_split(self) -> str:
        """The name of the split to evaluate: "heldout", or "train" if no image is held out."""
        return "heldout" if self.manifest["counts"]["images"].get("heldout", 0) else "train"

    def captions(self) -> CaptionStore:
        """Opens the store of the captions' texts, which all splits share."""
        dim = 0 if self._is_named else self.text_dim
        return self._once(caption_store(""), lambda: CaptionStore(self, dim))

    def features(self, name: str) -> FeatureStore:
        """Opens the features of a text encoder, by caption id.

        name: of the encoder; "" for the unnamed one. Raises ValueError if there is none.
        """
        self._texts.check_named(name)
        return self._once(f"features {name}", lambda: FeatureStore(self, name))

    def _once(self, name: str, make: Callable[[], _Store]) -> Any:
        """The store of this name; all callers share one, and its open shards."""
        if name not in self._stores:
            self._stores[name] = make()
        return self._stores[name]

    def check_text(self, inputs: Sequence[TextInput]) -> None:
        """Raises ValueError unless the stored features fit these inputs of a stage.

        An input of dim 0 has any width.
        """
        self._texts.check(inputs)

    def check_image_size(self, size: int) -> None:
        """Raises ValueError if an image is smaller than `size` pixels."""
        smallest = self.manifest["image_sizes"]["min_side"]
        if smallest < size:
            resized = 0 < self.manifest.get("store_size", 0) < size
            larger = f" and --store_size {size} or more" if resized else ""
            raise ValueError(
                f"{self.path} has images with a side of only {smallest} pixels, but data.image_size"
                f" is {size}: prepare with --min_size {size}{larger}"
            )

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Raises ValueError that names the first shard whose content differs from its checksum.

        names: of the shards to read; None for all.
        """
        verify_shards(self.path, self.manifest, self.manifest["shards"] if names is None else names)


_OPENED: dict[str, tuple[tuple[Any, ...], Prepared]] = {}  # of `open_once`, by path


def open_once(path: str | os.PathLike, place: Place = Place()) -> Prepared:
    """`Prepared(path, place)`, the same object for all callers of this process.

    A manifest with another size, time or place on the disk is opened again.
    """
    root = absolute(as_path("prepared data", path))
    try:
        inode = 0 if in_bucket(root) else os.stat(root / MANIFEST).st_ino
        version = *file_state(root / MANIFEST), inode, place
    except OSError:
        return Prepared(path, place)  # says what is wrong
    name = os.path.normpath(root)
    if name not in _OPENED or _OPENED[name][0] != version:
        _OPENED[name] = version, Prepared(root, place)
    return _OPENED[name][1]
