"""The text fields of one example: its caption's stored features, token features padded."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from imagen_jax.data.records import FeatureStore, Prepared
from imagen_jax.data.transforms import pad_text
from imagen_jax.text_inputs import MASK, POOLED, TEXT, TextInput, key

Fields = dict[str, Shaped[np.ndarray, "..."]]  # of one row of a batch
TextOf = Callable[[int], Fields]  # caption id -> fields; picklable, safe to share between threads


@runtime_checkable
class ExampleText(Protocol):
    """How the pipeline gets the text fields of an example."""

    def open(self, prepared: Prepared) -> TextOf:
        """The reader of a prepared directory. Raises ValueError if it lacks what is needed."""
        ...


# How rows of an evaluation get their text: (prepared data, caption ids of the rows) -> ExampleText.
# All processes call it together.
Reading = Callable[[Prepared, Sequence[int]], ExampleText]


def read_stored(inputs: Sequence[TextInput]) -> Reading:
    """Reads the stored features of these inputs."""
    return lambda prepared, caption_ids: StoredText(inputs)


@dataclasses.dataclass(frozen=True)
class StoredText:
    """Stored features of the given inputs, padded to their lengths.

    An unnamed input of dim 0 reads the features of the only unnamed encoder, of any width; data
    without such an encoder has no fields for it.
    """

    inputs: Sequence[TextInput]

    def open(self, prepared: Prepared) -> TextOf:
        """See `ExampleText`."""
        inputs = [one for one in self.inputs if one.dim or one.name in prepared.encoders]
        prepared.check_text(inputs)
        return _Padded(tuple((one, prepared.features(one.name)) for one in inputs))


@dataclasses.dataclass(frozen=True)
class _Padded:
    stores: tuple[tuple[TextInput, FeatureStore], ...]

    def __call__(self, caption_id: int) -> Fields:
        fields: Fields = {}
        for one, store in self.stores:
            features = store[caption_id]
            text, mask = pad_text(features.embedding, one.length)
            fields |= {key(TEXT, one.name): text, key(MASK, one.name): mask}
            if one.pooled_dim:
                fields[key(POOLED, one.name)] = features.pooled
        return fields
