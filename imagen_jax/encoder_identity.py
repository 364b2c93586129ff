"""Identities of text encoders: whether two things were made with the same features.

A checkpoint, a picture's record and prepared data keep the identity of one unnamed encoder as it
is, those of named encoders as {"encoders": {name: identity}}. A checkpoint has those of the
encoders that the stage reads.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from imagen_jax.text_inputs import UNNAMED

# Fields of an identity that determine the features; T5 has only the first three.
SAME_TEXT = (
    *("weights_sha256", "tokenizer_sha256", "dim"),
    *("family", "activation", "layer", "final_norm", "pooling"),
)
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


def differences(a: Identity, b: Identity) -> list[str]:
    """What differs between two encoders' features, for a message."""
    return [
        f"{key}: {a.get(key)} and {b.get(key)}" for key in SAME_TEXT if a.get(key) != b.get(key)
    ]


def check_same(
    names: Iterable[str],
    ours: Mapping[str, Identity],
    theirs: Mapping[str, Identity],
    who: str,
    remedy: str,
) -> None:
    """Raises ValueError unless both have these encoders, with the same features.

    names: of the encoders that are read; others do not matter. ours, theirs: identities by name.
    who: the two things that are compared, the subject of the message. remedy: what to do, its end.
    """
    for name in names:
        if name not in ours or name not in theirs:
            _refuse(who, f"{_listed(ours)} and {_listed(theirs)}", name, remedy)
        if differ := differences(ours[name], theirs[name]):
            _refuse(who, "; ".join(differ), name, remedy)


def find(
    name: str, identity: Identity, encoders: Mapping[str, Identity], who: str, remedy: str
) -> str:
    """The name, among `encoders`, of the encoder that an input was trained with.

    name: of the input; an unnamed input may have any encoder with its identity. who, remedy: as in
    `check_same`. Raises ValueError if there is none.
    """
    if name in encoders:
        check_same([name], {name: identity}, encoders, who, remedy)
        return name
    same = [other for other, theirs in encoders.items() if not differences(identity, theirs)]
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
