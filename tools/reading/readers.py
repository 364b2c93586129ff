"""The readers that `tools.reader_speed` compares; each yields batches of uint8 [b s s 3] forever.

All decode with `imagen_jax.data.transforms.decode_square`, in the same number of worker processes.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import grain

from configs import base_64, sr_256, sr_1024
from imagen_jax.data import pipeline, transforms
from imagen_jax.data.sources import parquet, webdataset
from imagen_jax.data.sources.source import Source

CONFIGS = {"base_64": base_64, "sr_256": sr_256, "sr_1024": sr_1024}
SEED = 0


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one row of the result reads.

    reader: an entry of READERS. path: of the data below DATA. size: side of the images in pixels.
    decode: the config field `data.decode`. config: one of CONFIGS, whose section `data` has the
    sizes; "" for whole images of `size`.
    batch_size: images per batch. workers: worker processes.
    """

    reader: str
    path: str
    size: int
    decode: str
    config: str
    batch_size: int
    workers: int


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """Decoded images of a source, in order."""

    source: Source
    size: int
    decode: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return transforms.decode_square(self.source[index].image, self.size, self.decode)


def _from_source(source: Source, reading: Reading) -> Iterator[Any]:
    images = grain.MapDataset.source(_Decoded(source, reading.size, reading.decode))
    batches = images.repeat().batch(reading.batch_size, drop_remainder=True)
    # Sources are made for reading in order, so each process reads with one thread.
    reader = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if reading.workers:
        options = grain.MultiprocessingOptions(num_workers=reading.workers)
        reader = reader.mp_prefetch(options)
    return iter(reader)


def tar(reading: Reading) -> Iterator[Any]:
    """The source `webdataset:`."""
    return _from_source(webdataset.WebDatasetSource(f"{reading.path}/*.tar", 0.0), reading)


def parquet_files(reading: Reading) -> Iterator[Any]:
    """The source `parquet:`."""
    options = parquet.Options()
    return _from_source(parquet.ParquetSource(f"{reading.path}/*.parquet", options), reading)


def prepared(reading: Reading) -> Iterator[Any]:
    """Training batches of prepared data, text features included."""
    data = CONFIGS[reading.config or "base_64"].get_config().data.to_dict()
    data |= {"path": reading.path, "decode": reading.decode, "workers": reading.workers}
    data |= {"batch_size": reading.batch_size}
    if not reading.config:
        data |= {"image_size": reading.size, "lowres_size": 0, "crop_size": 0}
    batches = pipeline.batches(data, SEED, 0)
    try:
        for batch in batches:
            yield batch["image"]
    finally:
        batches.close()


def data_loader(reading: Reading) -> Iterator[Any]:
    """PyTorch's DataLoader over the package `webdataset`."""
    import glob

    import torch
    import webdataset as wds

    decode = functools.partial(transforms.decode_square, size=reading.size, decode=reading.decode)
    dataset = (
        wds.WebDataset(sorted(glob.glob(f"{reading.path}/*.tar")), shardshuffle=False)
        .repeat()
        .to_tuple("jpg", "txt")
        .map_tuple(decode, bytes.decode)
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=reading.batch_size, num_workers=reading.workers
    )
    return (images for images, _ in loader)


READERS = {
    "tar": tar,
    "parquet": parquet_files,
    "prepared": prepared,
    "DataLoader": data_loader,
}
