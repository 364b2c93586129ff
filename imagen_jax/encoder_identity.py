"""Identities of text encoders: whether two things were made with the same features.

A checkpoint, a picture's record and prepared data keep the identity of one unnamed encoder as it
is, those of named encoders as {"encoders": {name: identity}}. A checkpoint has those of the
encoders that the stage reads.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from imagen_jax.text_inputs import UNNAMED, TextInput

# Fields of an identity that determine the features; T5 has only the first three.
SAME_TOKENS = (
    *("weights_sha256", "tokenizer_sha256", "dim"),
    *("family", "activation", "layer", "final_norm"),
)
SAME_TEXT = (*SAME_TOKENS, "pooling")  # with a pooled vector
Identity = Mapping[str, Any]
SEVERAL = "encoders"


def to_record(encoders: Mapping[str, Identity]) -> dict[str, Any]:
    """The form in which the identities of encoders by name are kept."""
    if set(encoders) == {UNNAMED}:
        return dict(encoders[UNNAMED])
    return {SEVERAL: {name: dict(identity) for name, identity in encoders.items()}}


def from_record(record: Mapping[str, Any]) -> dict[str, Identity]:
    """{name: identity} of what is kept; {"": identity} of one unnamed encoder."""
    return dict(record[SEVERAL]) if SEVERAL in record else {UNNAMED: record}


def fields_read(text_input: TextInput) -> tuple[str, ...]:
    """The fields of an encoder's identity that determine what an input reads."""
    return SAME_TEXT if text_input.pooled_dim else SAME_TOKENS


def _differences(text_input: TextInput, a: Identity, b: Identity) -> list[str]:
    """What differs between two encoders in what an input reads, for a message."""
    fields = fields_read(text_input)
    return [f"{key}: {a.get(key)} and {b.get(key)}" for key in fields if a.get(key) != b.get(key)]


def check_same(
    inputs: Iterable[TextInput],
    ours: Mapping[str, Identity],
    theirs: Mapping[str, Identity],
    who: str,
    remedy: str,
) -> None:
    """Raises ValueError unless both have these encoders, with the same features.

    inputs: that are read; other encoders, and pooled vectors that no input reads, do not matter.
    ours, theirs: identities by name. who: the two things that are compared, the subject of the
    message. remedy: what to do, its end.
    """
    for text_input in inputs:
        name = text_input.name
        if name not in ours or name not in theirs:
            _refuse(who, f"{_listed(ours)} and {_listed(theirs)}", name, remedy)
        if differ := _differences(text_input, ours[name], theirs[name]):
            _refuse(who, "; ".join(differ), name, remedy)


def find(
    text_input: TextInput,
    identity: Identity,
    encoders: Mapping[str, Identity],
    who: str,
    remedy: str,
) -> str:
    """The name, among `encoders`, of the encoder that an input was trained with.

    An unnamed input may have any encoder with its identity. who, remedy: as in `check_same`. Raises
    ValueError if there is none.
    """
    name = text_input.name
    if name in encoders:
        check_same([text_input], {name: identity}, encoders, who, remedy)
        return name
    same = [
        other
        for other, theirs in encoders.items()
        if not _differences(text_input, identity, theirs)
    ]
    if (name == UNNAMED or UNNAMED in encoders) and same:
        return same[0]
    needed = name or identity.get("name")
    _refuse(who, f"{needed} is needed, {_listed(encoders)} given", UNNAMED, remedy)


def _listed(encoders: Mapping[str, Identity]) -> str:
    named = ", ".join(filter(None, encoders))
    return named or ("one unnamed encoder" if encoders else "none")


def _refuse(who: str, what: str, name: str, remedy: str) -> None:
    named = f" {name}" if name else ""
    raise ValueError(f"{who} do not share a text encoder{named} ({what}); {remedy}")
