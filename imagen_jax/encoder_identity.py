"""Identities of text encoders: whether two things were made with the same features.

A checkpoint, a picture's record and prepared data keep the identity of one unnamed encoder as it
is, those of named encoders as {"encoders": {name: identity}}.
"""

from collections.abc import Mapping
from typing import Any

from imagen_jax.text_inputs import UNNAMED

# Fields of an identity that determine the features; T5 has only the first three.
SAME_TEXT = (
    *("weights_sha256", "tokenizer_sha256", "dim"),
    *("family", "activation", "layer", "final_norm", "pooling"),
)
Identity = Mapping[str, Any]
SEVERAL = "encoders"


def stored(encoders: Mapping[str, Identity]) -> dict[str, Any]:
    """The form in which the identities of encoders by name are kept."""
    if set(encoders) == {UNNAMED}:
        return dict(encoders[UNNAMED])
    return {SEVERAL: {name: dict(identity) for name, identity in encoders.items()}}


def by_name(identities: Mapping[str, Any]) -> dict[str, Identity]:
    """{name: identity} of what is kept; {"": identity} of one unnamed encoder."""
    return dict(identities[SEVERAL]) if SEVERAL in identities else {UNNAMED: identities}


def differences(a: Identity, b: Identity) -> list[str]:
    """What differs between two encoders' features, for a message."""
    return [
        f"{key}: {a.get(key)} and {b.get(key)}" for key in SAME_TEXT if a.get(key) != b.get(key)
    ]


def check_encoder(a: Mapping[str, Any], b: Mapping[str, Any], who: str) -> None:
    """Raises ValueError unless both agree in weights, tokenizer, layer and pooling.

    Of named encoders, those that both have must agree, and there must be one.

    a, b: identities as they are kept. who: the two things that are compared, the subject of the
        message.
    """
    ours, theirs = by_name(a), by_name(b)
    shared = [name for name in ours if name in theirs]
    if not shared and UNNAMED in (*ours, *theirs):
        _check_unnamed(ours, theirs, who)
    elif not shared:
        _refuse(who, f"{', '.join(ours)} and {', '.join(theirs)}")
    for name in shared:
        if differ := differences(ours[name], theirs[name]):
            _refuse(who, "; ".join(differ), name)


def find(name: str, identity: Identity, encoders: Mapping[str, Identity], who: str) -> str:
    """The name, among `encoders`, of the encoder that an input was trained with.

    name: of the input; an unnamed input may have any encoder with its identity. who: as in
    `check_encoder`. Raises ValueError if there is none.
    """
    if name in encoders:
        if differ := differences(identity, encoders[name]):
            _refuse(who, "; ".join(differ), name)
        return name
    same = [other for other, theirs in encoders.items() if not differences(identity, theirs)]
    if (name == UNNAMED or UNNAMED in encoders) and same:
        return same[0]
    listed = ", ".join(filter(None, encoders)) or "one unnamed encoder"
    _refuse(who, f"{name or identity.get('name')} is needed, {listed} given")


def _check_unnamed(ours: Mapping[str, Identity], theirs: Mapping[str, Identity], who: str) -> None:
    one, several = (ours, theirs) if UNNAMED in ours else (theirs, ours)
    find(UNNAMED, one[UNNAMED], several, who)


def _refuse(who: str, what: str, name: str = UNNAMED) -> None:
    named = f" {name}" if name else ""
    raise ValueError(
        f"{who} do not share a text encoder{named} ({what}); use stages that were trained with the"
        " same text encoder"
    )
