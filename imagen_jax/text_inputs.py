"""The text inputs of a stage: one per text encoder, and the names of their fields in a batch.

A stage with one unnamed encoder (`text.dim`) has the fields `text` and `text_mask`. A stage with
named encoders (`text.encoders`) has `text.NAME`, `text_mask.NAME` and, for an encoder with a pooled
vector, `pooled.NAME`.
"""

import dataclasses
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import BFloat16

TEXT, MASK, POOLED = "text", "text_mask", "pooled"
KINDS = (TEXT, MASK, POOLED)
TOKENS = "tokens"  # token ids, of which text.online computes the features
DROP = "drop"  # whether the text, or one input alone, is dropped: an entry of the random numbers
NAME = r"[a-z][a-z0-9]*"  # of a text encoder among several
UNNAMED = ""  # the name of the only encoder of a stage without `text.encoders`


@dataclasses.dataclass(frozen=True)
class TextInput:
    """The features of one text encoder, as a stage reads them.

    name: of the encoder in the prepared data; UNNAMED for data with one unnamed encoder.
    dim: features per token.
    length: tokens per caption, padding included.
    pooled_dim: features of the pooled vector; 0 if the stage does not read it.
    drop: probability in training of dropping this input alone.
    """

    name: str
    dim: int
    length: int
    pooled_dim: int = 0
    drop: float = 0.0

    @property
    def length_field(self) -> str:
        """The config field of `length`."""
        return "text.lengths" if self.name else "data.text_length"


@dataclasses.dataclass(frozen=True)
class TextFeatures:
    """The features of one text encoder for one text.

    embedding: token features, unpadded. pooled: the pooled vector; None if it has none.
    """

    embedding: BFloat16[np.ndarray, "length d"]
    pooled: BFloat16[np.ndarray, " e"] | None = None


def field_name(kind: str, name: str) -> str:
    """The field of a batch. kind: one of KINDS, or TOKENS. name: of the encoder."""
    return f"{kind}.{name}" if name else kind


def is_text(field: str) -> bool:
    """Whether a field of a batch belongs to a text input."""
    return field.partition(".")[0] in KINDS


def encoder_names(fields: Iterable[str]) -> list[str]:
    """The encoders of the text inputs among these fields, in order of the fields."""
    split = (field.partition(".") for field in fields)
    return [name for kind, _, name in split if kind == MASK]


def longest_input(name: str, inputs: Iterable[TextInput], encoders: Container[str]) -> int:
    """The tokens of the longest text that these inputs read from the encoder `name`.

    encoders: all names. An input without an encoder of its name may read any of them.
    """
    lengths = [each.length for each in inputs if each.name == name or each.name not in encoders]
    return max(lengths, default=1)


def text_inputs(config: Mapping[str, Any]) -> tuple[TextInput, ...]:
    """The text inputs of a stage's complete config; none for a stage without text.

    Raises ValueError if the fields of the section `text` do not fit together.
    """
    text = config["text"]
    if text["online"] and not text["online_encoder"]:
        raise ValueError("text.online needs an encoder: set text.online_encoder=NAME")
    if not text["encoders"]:
        single = TextInput(UNNAMED, text["dim"], config["data"]["text_length"])
        return (single,) if text["dim"] else ()
    if text["dim"]:
        raise ValueError(
            f"text.dim = {text['dim']} is the width of a single unnamed encoder: with text.encoders"
            " set text.dim = 0 and text.dims"
        )
    for name in text["encoders"]:
        if not re.fullmatch(NAME, name):
            raise ValueError(
                f"text.encoders has the name {name!r}: give the names of prepare_data --encoder"
                " NAME=..., of lower-case letters and digits; for one encoder without a name set"
                " text.encoders = () and text.dim"
            )
    if len(set(text["encoders"])) < len(text["encoders"]):
        raise ValueError(f"text.encoders = {tuple(text['encoders'])} has a name twice")
    columns = ("encoders", "dims", "lengths", "pooled_dims", "drops")
    sizes = {column: len(text[column]) for column in columns}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"text.{column} has {size}" for column, size in sizes.items())
        raise ValueError(f"the fields of the text encoders need one entry for each: {listed}")
    return tuple(TextInput(*row) for row in zip(*(text[column] for column in columns)))
