"""The text fields of one example: its caption's stored token features, padded."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from imagen_jax.data.records import CaptionStore, Prepared
from imagen_jax.data.transforms import pad_text
from imagen_jax.text_inputs import MASK, TEXT, TextInput, key

Fields = dict[str, Shaped[np.ndarray, "..."]]  # of one row of a batch
TextOf = Callable[[int], Fields]  # caption id -> fields; picklable, safe to share between threads


@runtime_checkable
class ExampleText(Protocol):
    """How the pipeline gets the text fields of an example."""

    def open(self, prepared: Prepared) -> TextOf:
        """The reader of a prepared directory. Raises ValueError if it lacks what is needed."""
        ...


@dataclasses.dataclass(frozen=True)
class StoredText:
    """Stored features of the given inputs, padded to their lengths."""

    inputs: Sequence[TextInput]

    def open(self, prepared: Prepared) -> TextOf:
        """See `ExampleText`."""
        (one,) = self.inputs
        prepared.check_length(one.length)
        return _Padded(prepared.captions(), one)


@dataclasses.dataclass(frozen=True)
class _Padded:
    captions: CaptionStore
    input: TextInput

    def __call__(self, caption_id: int) -> Fields:
        features, mask = pad_text(self.captions[caption_id].embedding, self.input.length)
        return {key(TEXT, self.input.name): features, key(MASK, self.input.name): mask}
