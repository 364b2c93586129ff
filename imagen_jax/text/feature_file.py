"""Features of many texts in a temporary file, so that memory does not grow with their number."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16

from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text_inputs import TextFeatures

CHUNK = 1024  # texts that are encoded before they are written
MOST_PER_DEVICE = 64  # texts of a batch; more make a token no cheaper, see `TextEncoder.encode`


class FeatureFile:
    """The features of distinct texts, unpadded, read from disk one by one.

    The file has no name and ends with the process. Several threads may read it.
    """

    def __init__(self, directory: Path, dim: int, pooled_dim: int = 0):
        """directory: where the file is. dim: features per token. pooled_dim: per text."""
        self._file = tempfile.TemporaryFile(dir=directory)
        self._dim, self._pooled_dim = dim, pooled_dim
        self._places: dict[str, tuple[int, int]] = {}  # text -> (offset in bytes, tokens)

    def __contains__(self, text: str) -> bool:
        return text in self._places

    def add(
        self,
        text: str,
        features: BFloat16[np.ndarray, "l d"],
        pooled: BFloat16[np.ndarray, " e"] | None = None,
    ) -> None:
        """Stores the token features of a text and its pooled vector, if there is one."""
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(features).tobytes())
        if pooled is not None:
            self._file.write(np.ascontiguousarray(pooled).tobytes())
        self._file.flush()
        self._places[text] = offset, len(features)

    def __getitem__(self, text: str) -> TextFeatures:
        offset, tokens = self._places[text]
        size = tokens * self._dim
        read = os.pread(self._file.fileno(), 2 * (size + self._pooled_dim), offset)
        values = np.frombuffer(read, ml_dtypes.bfloat16)
        pooled = values[size:] if self._pooled_dim else None
        return TextFeatures(values[:size].reshape(tokens, self._dim), pooled)


def texts_per_device(batch_size: int, devices: int) -> int:
    """The `batch_size` of `encode` for a batch of images on all `devices` of all processes."""
    return min(-(-batch_size // devices), MOST_PER_DEVICE)


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The distinct texts in their order, at most CHUNK at once."""
    distinct = list(dict.fromkeys(texts))
    for start in range(0, len(distinct), CHUNK):
        yield distinct[start : start + CHUNK]


def encode(
    encoder: TextEncoder,
    texts: Iterable[str],
    batch_size: int,
    directory: Path,
    progress: Callable[[int], None],
) -> FeatureFile:
    """Encodes every distinct text once, always by the same programs (see `TextEncoder.encode`).

    batch_size: texts per device and batch. progress: is called with the number of texts done.
    """
    features = FeatureFile(directory, encoder.dim, encoder.pooled_dim)
    done = 0
    for chunk in chunks(texts):
        for row in zip(chunk, *encoder.encode_pooled(chunk, batch_size, fill=True)):
            features.add(*row)
        done += len(chunk)
        progress(done)
    return features
