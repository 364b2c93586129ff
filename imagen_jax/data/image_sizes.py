"""Heights and widths of all images of a split, in a file beside the shards.

    DIR/images/sizes-SPLIT.npy   uint32 [images, 2]: height and width as stored

prepare_data writes the file; the manifest does not list it. For data that lacks it, it is written
when it is first needed, which reads all records once; in the directory for temporary files, if the
data are on a read-only disk.
"""

import dataclasses
import errno
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt32

from imagen_jax.data.index_files import MappedArray, build_once, cache_directory
from imagen_jax.data.records import ImageRow, ImageStore, Prepared
from imagen_jax.object_storage import AnyPath
from imagen_jax.run_log import Progress
from imagen_jax.storage import flush

THREADS = 4  # that read records; more than one hides the latency of a network file system
CHUNK = 256  # records that a thread reads at once
ROWS = 1 << 16  # sizes that `ImageSizes.chunks` returns at once
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclasses.dataclass(frozen=True)
class ImageSizes:
    """The sizes of a split's images by row; see `open_sizes`."""

    mapped: MappedArray

    def __len__(self) -> int:
        return len(self.mapped.array)

    def chunks(self) -> Iterator[tuple[int, UInt32[np.ndarray, "k 2"]]]:
        """(first row, sizes of the rows from there on), for all rows in order."""
        for start in range(0, len(self), ROWS):
            yield start, self.mapped.array[start : start + ROWS]

    def sha256(self) -> str:
        """Identity of all sizes; reads them once, 8 bytes for each image."""
        digest = hashlib.sha256()
        for _, part in self.chunks():
            digest.update(part.tobytes())
        return digest.hexdigest()

    def check(self, row: int, stored: ImageRow) -> None:
        """Raises ValueError unless a record has the size that the file says."""
        height, width = self.mapped.array[row].tolist()
        if (height, width) != (stored.height, stored.width):
            raise ValueError(
                f"{self.mapped.path} does not belong to the images: row {row} is {stored.height}x"
                f"{stored.width}, not {height}x{width}; remove it; it is written again"
            )


def open_sizes(prepared: Prepared, split: str) -> ImageSizes:
    """The sizes of a split's images; writes their file first if there is none.

    Raises ValueError if the file is damaged or of another number of images, or if a shard is
    damaged.
    """
    images = prepared.images(split)
    path = file_of(prepared.path, split)
    if not path.exists():
        write = lambda temporary: _write(temporary, images, f"sizes of {prepared.path}, {split}")
        try:
            build_once(path, write)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            path = cache_directory() / f"{prepared.hash}-{path.name}"
            build_once(path, write)
    sizes = ImageSizes(MappedArray(path))
    if sizes.mapped.array.shape != (len(images), 2):
        raise ValueError(
            f"{path} has the sizes of {len(sizes)} images, but there are {len(images)}: remove it;"
            " it is written again"
        )
    return sizes


def file_of(root: AnyPath, split: str) -> AnyPath:
    """The file of a split in prepared data at `root`."""
    return root / "images" / f"sizes-{split}.npy"


def write_file(path: Path, total: int, parts: Iterable[Sequence[tuple[int, int]]]) -> None:
    """Writes the (height, width) of `total` images, given in parts in the order of the rows."""
    sizes, start = np.lib.format.open_memmap(path, "w+", np.uint32, (total, 2)), 0
    for part in parts:
        sizes[start : start + len(part)] = part
        start += len(part)
    sizes.flush()
    flush(path)


def _write(path: Path, images: ImageStore, label: str) -> None:
    """Writes the sizes of all images, as their records are read."""
    total = len(images)
    with Progress(label, total) as progress:
        write_file(path, total, _read(images, progress))


def _read(images: ImageStore, progress: Progress) -> Iterator[list[tuple[int, int]]]:
    total, done = len(images), 0
    starts = iter(range(0, total, CHUNK))
    read = lambda start: [
        size_of(images.record(row)) for row in range(start, start + CHUNK)[: total - start]
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        while some := list(itertools.islice(starts, 4 * THREADS)):
            for part in pool.map(read, some):
                yield part
                done += len(part)
                progress.update(done)


def size_of(record: bytes) -> tuple[int, int]:
    """Height and width in the record of an image; does not parse the rest as TFDS does."""
    from tensorflow_datasets.proto import tf_example_pb2

    features = tf_example_pb2.Example.FromString(record).features.feature
    height, width = (features[name].int64_list.value[0] for name in ("height", "width"))
    return height, width
