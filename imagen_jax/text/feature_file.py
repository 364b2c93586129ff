"""Features of many texts in a temporary file, so that memory does not grow with their number."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16

from imagen_jax.text.encoder import TextEncoder

CHUNK = 1024  # texts that are encoded before they are written
MOST_PER_DEVICE = 64  # texts of a batch; more make a token no cheaper, see `TextEncoder.encode`


class FeatureFile:
    """The features of distinct texts, unpadded bfloat16 [l, dim], read from disk one by one.

    The file has no name and ends with the process.
    """

    def __init__(self, directory: Path, dim: int):
        """directory: where the file is. dim: features per token."""
        self._file = tempfile.TemporaryFile(dir=directory)
        self._dim = dim
        self._places: dict[str, tuple[int, int]] = {}  # text -> (offset in bytes, tokens)

    def __contains__(self, text: str) -> bool:
        return text in self._places

    def add(self, text: str, features: BFloat16[np.ndarray, "l d"]) -> None:
        """Stores the features of a text."""
        offset = self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(features).tobytes())
        self._places[text] = offset, len(features)

    def __getitem__(self, text: str) -> BFloat16[np.ndarray, "l d"]:
        offset, tokens = self._places[text]
        self._file.seek(offset)
        data = self._file.read(2 * tokens * self._dim)
        return np.frombuffer(data, ml_dtypes.bfloat16).reshape(tokens, self._dim)


def texts_per_device(batch_size: int, devices: int) -> int:
    """The `batch_size` of `encode` for a batch of images on all `devices` of all processes."""
    return min(-(-batch_size // devices), MOST_PER_DEVICE)


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
    features = FeatureFile(directory, encoder.dim)
    distinct = list(dict.fromkeys(texts))
    for start in range(0, len(distinct), CHUNK):
        chunk: Sequence[str] = distinct[start : start + CHUNK]
        for text, feature in zip(chunk, encoder.encode(list(chunk), batch_size, fill=True)):
            features.add(text, feature)
        progress(start + len(chunk))
    return features
