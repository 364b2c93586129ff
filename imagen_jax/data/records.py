"""The on-disk record: an image store and a caption store (ArrayRecord shards in TFDS directories)
under one manifest.

    DIR/manifest.json   written last: the directory is complete if and only if it is there
    DIR/images/         splits train and heldout: image (encoded bytes), height, width, id,
                        caption_ids
    DIR/captions/       split train: text, embedding [length d] bfloat16 without padding, length;
                        a caption's id is its row
    DIR/skipped.jsonl   one line for every item that was left out or noted, with the reason

Both stores open with `tfds.builder_from_directory` (`import ml_dtypes` first, which teaches NumPy
the name bfloat16); nothing here imports TensorFlow.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imagen_jax.storage import is_away, sha256_file

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
PAUSES_S = (1.0, 5.0, 25.0)  # before a shard that its file system did not give is read again
# One record a group gives random access. Images are already compressed; zstd takes a fifth off
# bfloat16 embeddings.
WRITER_OPTIONS = {"images": "group_size:1,uncompressed", "captions": "group_size:1,zstd:3"}
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageRow:
    """One image: encoded bytes (a format PIL reads), size in pixels, the source's id, rows of its
    captions.
    """

    image: bytes
    height: int
    width: int
    id: str
    caption_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CaptionRow:
    """One distinct caption: its text and its token features [length d] bfloat16, unpadded."""

    text: str
    embedding: np.ndarray


@functools.cache
def image_features():
    """The TFDS features of the image store; the image is given and kept as encoded bytes."""
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
def caption_features(dim: int):
    """The TFDS features of the caption store for token features of width `dim`."""
    import ml_dtypes
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "text": tfds.features.Text(),
            "embedding": tfds.features.Tensor(
                shape=(None, dim), dtype=ml_dtypes.bfloat16, encoding="bytes"
            ),
            "length": np.int32,
        }
    )


@functools.cache
def import_tfds() -> None:
    """Makes TFDS import all that reading needs, by reading a record of each kind. To be called
    before threads read.

    TFDS imports its parts when they are first used; two threads that do so at once wait for each
    other for ever.
    """
    import io

    import ml_dtypes
    from PIL import Image

    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    parse_image(serialize_image(ImageRow(pixel.getvalue(), 1, 1, "", (0,))))
    parse_caption(serialize_caption(CaptionRow("", np.zeros((1, 1), ml_dtypes.bfloat16))), 1)


def serialize_image(row: ImageRow) -> bytes:
    """ImageRow -> the bytes of its record."""
    return _canonical(image_features().serialize_example(dataclasses.asdict(row)))


def serialize_caption(row: CaptionRow) -> bytes:
    """CaptionRow -> the bytes of its record."""
    length, dim = row.embedding.shape
    example = {"text": row.text, "embedding": row.embedding, "length": length}
    return _canonical(caption_features(dim).serialize_example(example))


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


def parse_caption(record: bytes, dim: int) -> CaptionRow:
    """Inverse of `serialize_caption`."""
    example = caption_features(dim).deserialize_example_np(record)
    return CaptionRow(text=example["text"].decode(), embedding=example["embedding"])


def _canonical(example: bytes) -> bytes:
    """A serialised tf.Example with its features in sorted order; protobuf's own order differs from
    process to process.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


def shard_name(store: str, split: str, index: int, count: int) -> str:
    """File name, relative to the prepared directory, of shard `index` of `count` of a store's
    split.
    """
    return f"{store}/{store}-{split}.array_record-{index:05d}-of-{count:05d}"


def write_shard(root: Path, name: str, records: Iterable[bytes]) -> dict:
    """Write one ArrayRecord shard `root/name` atomically.

    Returns its entry for the manifest: rows, bytes, sha256. The bytes depend on the records alone.
    """
    from array_record.python import array_record_module

    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = array_record_module.ArrayRecordWriter(
        str(temporary), WRITER_OPTIONS[name.split("/")[0]]
    )
    rows = 0
    for record in records:
        writer.write(record)
        rows += 1
    writer.close()
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    entry = {"rows": rows, "bytes": temporary.stat().st_size, "sha256": sha256_file(temporary)}
    os.replace(temporary, path)
    return entry


def write_tfds_metadata(root: Path, store: str, features, shards: Mapping[str, Mapping]) -> None:
    """Write the JSON files by which `tfds.builder_from_directory(root/store)` knows the shards in
    `shards`.
    """
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


def embedding_stats(captions: Mapping[str, Mapping]) -> dict:
    """Of the journal's entries of caption shards: lengths in tokens over captions, norms over
    tokens. All are finite, or there were no entry.
    """
    rows = sum(entry["rows"] for entry in captions.values())
    tokens = sum(entry["tokens"]["sum"] for entry in captions.values())
    stats = {}
    for name, key, count in (("length", "tokens", rows), ("norm", "norm", tokens)):
        parts = [entry[key] for entry in captions.values()]
        mean = sum(part["sum"] for part in parts) / count
        stats[name] = {
            "min": min(part["min"] for part in parts),
            "mean": mean,
            "max": max(part["max"] for part in parts),
        }
    return stats | {"tokens": tokens, "finite": True}


def manifest_hash(content: Mapping) -> str:
    """SHA-256 over the canonical JSON of a manifest without its own `hash`."""
    body = {key: value for key, value in content.items() if key != "hash"}
    return hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


class _Store:
    """Random access to the raw records of one split; picklable, safe to share between threads."""

    def __init__(self, root: Path, store: str, split: str, shards: Mapping[str, Mapping]):
        names = sorted(name for name in shards if name.startswith(f"{store}/{store}-{split}."))
        self._label = f"{root}/{store} ({split})"
        self._ends = np.cumsum([shards[name]["rows"] for name in names])
        self._paths = [str(root / name) for name in names]
        self._sums = [shards[name]["sha256"] for name in names]
        # Naming the rows of each file lets it be opened when first read, not here.
        self._spans = [
            f"{path}[0:{shards[name]['rows']}]"
            for path, name in zip(self._paths, names, strict=True)
        ]
        self._source = self._open()
        import_tfds()

    def _open(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(self._spans) if self._spans else ()

    def __setstate__(self, state: Mapping) -> None:
        self.__dict__.update(state)
        import_tfds()  # in a data worker, before it starts its reading threads

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._paths else 0

    def _record(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(
                f"{self._label} has rows 0 to {len(self) - 1}, row {row} was asked for"
            )
        return self._read(row, PAUSES_S)

    def _read(self, row: int, pauses: tuple[float, ...]) -> bytes:
        """A record; if its file system does not give it, again after each of `pauses`, in
        seconds.
        """
        try:
            return self._source[row]
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            fault = self._fault(row, error)
            if not pauses or not is_away(fault):
                raise fault from error
        log.warning("%s; trying again in %g s", fault, pauses[0])
        time.sleep(pauses[0])
        self._source = self._open()  # a reader that has failed once fails for ever
        return self._read(row, pauses[1:])

    def _fault(self, row: int, error: Exception) -> Exception:
        """Why a row cannot be read: its shard is not what was written (ValueError), or is, or
        cannot be looked at (OSError): then it was the file system.
        """
        shard = int(np.searchsorted(self._ends, row, side="right"))
        path, cause = self._paths[shard], (str(error) or type(error).__name__).splitlines()[0]
        try:
            whole = sha256_file(Path(path)) == self._sums[shard]
        except OSError as away:
            return OSError(away.errno, f"row {row} cannot be read: {away.strerror}", path)
        if whole:
            return OSError(
                errno.EIO,
                f"row {row} could not be read, though the file is as it was written ({cause})",
                path,
            )
        return ValueError(
            f"{path} is damaged, row {row} cannot be read: remove the directory and prepare the"
            f" data again ({cause})"
        )


class ImageStore(_Store):
    """Images of one split by row."""

    def __getitem__(self, row: int) -> ImageRow:
        return parse_image(self._record(row))


class CaptionStore(_Store):
    """Captions by caption id."""

    def __init__(self, root: Path, dim: int, shards: Mapping[str, Mapping]):
        super().__init__(root, "captions", "train", shards)
        self._dim = dim

    def __getitem__(self, caption_id: int) -> CaptionRow:
        return parse_caption(self._record(caption_id), self._dim)


class Prepared:
    """A prepared directory, opened: manifest and stores.

    Raises ValueError, in one line, where the directory is missing, incomplete, of another format
    version, or has shards whose sizes are not those in its manifest. `verify` also compares their
    content.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        file = self.path / MANIFEST
        if not file.is_file():
            raise ValueError(
                f"{self.path} is not prepared data (no {MANIFEST}): run python -m"
                " imagen_jax.prepare_data"
            )
        try:
            self.manifest = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): prepare the data again") from error
        if self.manifest["format_version"] != FORMAT_VERSION:
            found = self.manifest["format_version"]
            raise ValueError(
                f"{file} has format {found}, this program reads {FORMAT_VERSION}: prepare the data"
                " again"
            )
        if self.manifest["hash"] != manifest_hash(self.manifest):
            raise ValueError(f"{file} was changed after it was written: prepare the data again")
        for name, entry in self.manifest["shards"].items():
            shard = self.path / name
            if not shard.is_file() or shard.stat().st_size != entry["bytes"]:
                raise ValueError(f"{shard} is missing or cut short: prepare the data again")

    @property
    def hash(self) -> str:
        """Identity of the whole data set: SHA-256 over the manifest, which holds the hash of every
        shard.
        """
        return self.manifest["hash"]

    @property
    def encoder(self) -> dict:
        """Identity of the text encoder whose features are stored."""
        return self.manifest["encoder"]

    @property
    def text_dim(self) -> int:
        """Width d of the token features."""
        return self.manifest["encoder"]["dim"]

    def num_images(self, split: str) -> int:
        """Number of images in a split."""
        return self.manifest["counts"]["images"][split]

    def images(self, split: str) -> ImageStore:
        """The image store of a split; ValueError where the split has no images."""
        if self.manifest["counts"]["images"].get(split, 0) == 0:
            raise ValueError(f"{self.path} has no images in split {split!r}")
        return ImageStore(self.path, "images", split, self.manifest["shards"])

    @property
    def evaluation_split(self) -> str:
        """The held-out images, or, if none are held out, those trained on."""
        return "heldout" if self.manifest["counts"]["images"].get("heldout", 0) else "train"

    def captions(self) -> CaptionStore:
        """The caption store, shared by all splits."""
        return CaptionStore(self.path, self.text_dim, self.manifest["shards"])

    def check_text(self, dim: int) -> None:
        """ValueError unless the stored features have width `dim`."""
        if dim != self.text_dim:
            name = self.encoder["name"]
            raise ValueError(
                f"{self.path} has text features of width {self.text_dim} ({name}), the config asks"
                f" for {dim}"
            )

    def check_length(self, length: int) -> None:
        """ValueError if a stored caption is longer than `length` tokens: cutting features is not
        encoding less text.
        """
        longest = self.manifest["embedding"]["length"]["max"]
        if longest > length:
            raise ValueError(
                f"{self.path} has captions of up to {longest} tokens, the config's text length is"
                f" {length}: prepare with --max_length {length} or raise the text length"
            )

    def check_image_size(self, size: int) -> None:
        """ValueError if some image would have to be enlarged to be `size` pixels square."""
        smallest = self.manifest["image_sizes"]["min_side"]
        if smallest < size:
            raise ValueError(
                f"{self.path} has images only {smallest} pixels across, the config's image size is"
                f" {size}: prepare with --min_size {size}"
            )

    def verify(self) -> None:
        """ValueError naming the first shard whose content is not what was written."""
        for name, entry in self.manifest["shards"].items():
            if sha256_file(self.path / name) != entry["sha256"]:
                raise ValueError(
                    f"{self.path / name} is damaged (its checksum differs): remove {self.path} and"
                    " prepare the data again"
                )
