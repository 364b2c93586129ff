"""Which features of a text encoder are used, given with its name: NAME@layer=-2,pooling=end.

The choice belongs to the encoder's identity. Each family has its own defaults.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

SIGN = "@"
FORM = f"NAME{SIGN}layer=-2,final_norm=no,pooling=end"
WORDS = {"yes": True, "no": False}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen features; None is the family's default.

    layer: number of hidden states, as in transformers' `hidden_states`: 0 is the embeddings, k the
        output of block k, -1 the output of the last block.
    final_norm: whether the final layer norm is applied to the features of `layer`.
    pooling: kind of the pooled vector; a family has its own kinds.
    """

    layer: int | None = None
    final_norm: bool | None = None
    pooling: str | None = None

    def refuse(self, options: Sequence[str], kind: str) -> None:
        """Raises ValueError if one of `options` was chosen. kind: the family, for the message."""
        chosen = [name for name in options if getattr(self, name) is not None]
        if chosen:
            raise ValueError(f"{kind} encoders have no option {' or '.join(chosen)}: leave it out")


DEFAULT = Choice()


def parse(text: str) -> tuple[str, Choice]:
    """(name or directory, choice) of "NAME" or "NAME@OPTION=VALUE,...".

    A directory whose name has that form is a directory.

    Raises ValueError for an option or value that is not valid.
    """
    name, sign, options = text.rpartition(SIGN)
    if not sign or "=" not in options or "/" in options or pathlib.Path(text).is_dir():
        return text, DEFAULT
    chosen = {}
    for option in options.split(","):
        key, _, value = option.partition("=")
        if key not in READERS or key in chosen:
            fault = f"option {key!r} is given twice" if key in chosen else f"no option {key!r}"
            raise ValueError(
                f"text encoder {text!r}: {fault}; use {', '.join(READERS)}, as in {FORM}"
            )
        try:
            chosen[key] = READERS[key](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"text encoder {text!r}: {key} is {value!r}; write it as in {FORM}"
            ) from None
    return name, Choice(**chosen)


def resolve_layer(layer: int, blocks: int) -> int:
    """The layer counted from the embeddings, 0 to `blocks`. Raises ValueError if there is none."""
    if not -blocks - 1 <= layer <= blocks:
        raise ValueError(
            f"layer {layer}: the encoder has {blocks} blocks; choose 0 (embeddings) to {blocks}, or"
            f" {-blocks - 1} to -1"
        )
    return layer % (blocks + 1)


def check_pooling(pooling: str, kinds: Sequence[str]) -> str:
    """`pooling`. Raises ValueError unless it is one of `kinds`."""
    if pooling not in kinds:
        raise ValueError(f"pooling {pooling!r}: choose one of {', '.join(kinds)}")
    return pooling


READERS = {"layer": int, "final_norm": WORDS.__getitem__, "pooling": str}
