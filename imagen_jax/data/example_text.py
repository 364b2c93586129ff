"""The text fields of one example: features of its caption, stored or computed, or its token ids."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from imagen_jax.data.records import CaptionStore, FeatureStore, Prepared
from imagen_jax.data.transforms import pad_text
from imagen_jax.text_inputs import MASK, POOLED, TEXT, TOKENS, TextFeatures, TextInput, field_name

Fields = dict[str, Shaped[np.ndarray, "..."]]  # of one row of a batch
# Caption id -> fields; safe to share between threads. That of training data can be pickled.
TextOf = Callable[[int], Fields]
Tokenize = Callable[[list[str]], tuple[list[list[int]], list[bool]]]


@runtime_checkable
class ExampleText(Protocol):
    """How the pipeline gets the text fields of an example."""

    def open(self, prepared: Prepared) -> TextOf:
        """The reader of a prepared directory. Raises ValueError if it lacks what is needed."""
        ...


# How rows of an evaluation get their text: (prepared data, caption ids of the rows) -> ExampleText.
# All processes call it together.
EvaluationText = Callable[[Prepared, Sequence[int]], ExampleText]


@runtime_checkable
class FeaturesByText(Protocol):
    """Features of texts, safe to share between threads."""

    def __getitem__(self, text: str) -> TextFeatures: ...


def read_stored(inputs: Sequence[TextInput]) -> EvaluationText:
    """Reads the stored features of these inputs."""
    return lambda prepared, caption_ids: StoredFeatures(inputs)


def fields_of(text_input: TextInput, features: TextFeatures) -> Fields:
    """The fields of one text input, padded.

    Raises ValueError if the text has more tokens than the input.
    """
    text, mask = pad_text(features.embedding, text_input.length)
    fields = {field_name(TEXT, text_input.name): text, field_name(MASK, text_input.name): mask}
    if text_input.pooled_dim:
        fields[field_name(POOLED, text_input.name)] = features.pooled
    return fields


@dataclasses.dataclass(frozen=True)
class StoredFeatures:
    """Stored features of the given inputs, padded to their lengths.

    An unnamed input of dim 0 reads the features of the only unnamed encoder, of any width; data
    without such an encoder has no fields for it.
    """

    inputs: Sequence[TextInput]

    def open(self, prepared: Prepared) -> TextOf:
        """See `ExampleText`."""
        inputs = [
            text_input
            for text_input in self.inputs
            if text_input.dim or text_input.name in prepared.encoders
        ]
        prepared.check_text(inputs)
        stores = [(text_input, prepared.features(text_input.name)) for text_input in inputs]
        return _Stored(tuple(stores))


@dataclasses.dataclass(frozen=True)
class _Stored:
    stores: tuple[tuple[TextInput, FeatureStore], ...]

    def __call__(self, caption_id: int) -> Fields:
        fields: Fields = {}
        for text_input, store in self.stores:
            fields |= fields_of(text_input, store[caption_id])
        return fields


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """Features of certain captions that were computed before; it cannot be pickled.

    files: {text input: features by text}.
    """

    inputs: Sequence[TextInput]
    files: Mapping[str, FeaturesByText]

    def open(self, prepared: Prepared) -> TextOf:
        """See `ExampleText`."""
        return _Encoded(prepared.captions(), tuple(self.inputs), self.files)


@dataclasses.dataclass(frozen=True)
class _Encoded:
    captions: CaptionStore
    inputs: tuple[TextInput, ...]
    files: Mapping[str, FeaturesByText]

    def __call__(self, caption_id: int) -> Fields:
        text, fields = self.captions.text(caption_id), {}
        for text_input in self.inputs:
            fields |= fields_of(text_input, self.files[text_input.name][text])
        return fields


@dataclasses.dataclass(frozen=True)
class TokenText:
    """Token ids of the captions: an `ExampleText` with fields tokens [l] and text_mask [l].

    tokenize: {text input: its tokenizer}.
    """

    inputs: Sequence[TextInput]
    tokenize: Mapping[str, Tokenize]

    def open(self, prepared: Prepared) -> TextOf:
        """See `ExampleText`."""
        return _Tokens(prepared.captions(), tuple(self.inputs), dict(self.tokenize))


@dataclasses.dataclass(frozen=True)
class _Tokens:
    captions: CaptionStore
    inputs: tuple[TextInput, ...]
    tokenize: dict[str, Tokenize]

    def __call__(self, caption_id: int) -> Fields:
        text, fields = self.captions.text(caption_id), {}
        for text_input in self.inputs:
            name, length = text_input.name, text_input.length
            (row,), _ = self.tokenize[name]([text])
            tokens = np.zeros(length, np.int32)
            tokens[: len(row)] = row
            fields[field_name(TOKENS, name)] = tokens
            fields[field_name(MASK, name)] = np.arange(length) < len(row)
        return fields
