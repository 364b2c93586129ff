"""The options of prepare_data that its steps share."""

import dataclasses

from imagen_jax.data import records
from imagen_jax.data.prepare.resize import AS_IS, Resize


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is kept, and how it is stored.

    shard_size: images or captions per shard.
    min_size: images with a side shorter than this, in pixels, are skipped.
    batch_size: captions per device and batch, see text.encoder.TextEncoder.encode.
    processes: worker processes that check and write images; they do not affect the result.
    resize: how large images are resized before they are stored.
    embedding: dtype of the stored token features, one of records.EMBEDDINGS.
    """

    shard_size: int
    min_size: int
    batch_size: int
    processes: int
    resize: Resize = AS_IS
    embedding: str = records.EMBEDDINGS[0]

    def __post_init__(self):
        least = {"shard_size": 1, "min_size": 0, "batch_size": 1, "processes": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name} {getattr(self, name)} is less than {value}")
        if self.resize.side < 0:
            raise ValueError(f"--store_size {self.resize.side} is less than 0")
        if self.embedding not in records.EMBEDDINGS:
            known = " or ".join(records.EMBEDDINGS)
            raise ValueError(f"--embedding {self.embedding} is not implemented: use {known}")
