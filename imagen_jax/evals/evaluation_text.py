"""How an evaluation gets its text: features that are stored with the data, or computed ones.

Computed features are those of all chosen rows. They are encoded before the stage is placed on the
devices, by one encoder after another, and are read from temporary files.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from imagen_jax import encoder_identity
from imagen_jax.data.example_text import EncodedText, FeaturesByText
from imagen_jax.data.records import Prepared
from imagen_jax.data.text_checks import OtherText
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.online_text import OnlineText, load_encoder, named_encoders
from imagen_jax.text_inputs import TextInput, text_inputs
from imagen_jax.weights.text_encoders import readable_length

NONE, STORED, COMPUTED = "none", "stored", "computed"  # values of `text_features` in a result
REMEDY = "give --encoder, the text encoder of the checkpoint, or data with its features"
log = logging.getLogger("imagen_jax.evaluate")


def choose_encoder(
    config: Mapping[str, Any], trained: Mapping[str, Any], prepared: Prepared, flag: str
) -> str:
    """The text encoders to compute features with; "" to read stored ones, or for no text.

    Stored features are read if they are those of the training. config: complete config of the
    stage. trained: the record of its encoders. flag: the value of --encoder, or "".

    Raises ValueError if there are neither such features nor encoders, or if --encoder has no
    effect.
    """
    inputs = text_inputs(config)
    problem = _problem(config, trained, prepared) if inputs else ""
    if not problem:
        why = f"{prepared.path} has its features" if inputs else "the checkpoint reads no text"
        if flag:
            raise ValueError(f"--encoder {flag} has no effect, because {why}: omit it")
        return ""
    given = flag or config["text"]["online_encoder"]
    if given:
        log.info("text features are computed: %s", problem)
    else:
        raise ValueError(f"{problem}: {REMEDY}")
    return given


def kind(config: Mapping[str, Any], encoder: str) -> str:
    """Where the features are from. encoder: the result of `choose_encoder`."""
    return COMPUTED if encoder else STORED if text_inputs(config) else NONE


def _problem(config: Mapping[str, Any], trained: Mapping[str, Any], prepared: Prepared) -> str:
    """Why the stored features are not those that the stage reads; "" if they are.

    What a training can do about it is left out.
    """
    inputs, identities = text_inputs(config), encoder_identity.from_record(trained)
    who = f"{prepared.path} and the checkpoint"
    try:
        prepared.check_text(inputs)
    except OtherText as error:
        return error.fact
    try:
        encoder_identity.check_same(inputs, prepared.encoders, identities, who, REMEDY)
    except ValueError as error:
        return str(error).removesuffix(f"; {REMEDY}")
    return ""


def encode(
    config: Mapping[str, Any],
    trained: Mapping[str, Any],
    prepared: Prepared,
    caption_ids: Sequence[int],
    given: str,
    make_mesh: Callable[[int], Mesh],
) -> EncodedText:
    """Computes the features of these captions. All processes call it together.

    config, trained: see `choose_encoder`, whose result is `given`. make_mesh: bytes of an encoder's
    weights -> mesh.

    Raises ValueError if the encoders are not those of the training.
    """
    named = named_encoders(config, given, "--encoder or text.online_encoder")
    # An encoder may read less than the stage's padded input.
    inputs = {
        text_input.name: dataclasses.replace(
            text_input, length=readable_length(encoder, text_input.length)
        )
        for text_input, encoder in named
    }
    loaders = {
        text_input.name: functools.partial(
            load_encoder, inputs[text_input.name], encoder, make_mesh
        )
        for text_input, encoder in named
    }
    encoders, identities = Encoders(loaders), encoder_identity.from_record(trained)
    who = f"{given} and the checkpoint"
    encoder_identity.check_same(inputs.values(), encoders.identities, identities, who, REMEDY)
    files = {}
    for name in encoders.in_turn():
        files |= _encode_one(encoders, name, inputs, prepared, caption_ids)
    return EncodedText([text_input for text_input, _ in named], files)


def _encode_one(
    encoders: Encoders,
    name: str,
    inputs: Mapping[str, TextInput],
    prepared: Prepared,
    caption_ids: Sequence[int],
) -> Mapping[str, FeaturesByText]:
    """{name: features by text} of one encoder; keeps no reference to it."""
    encoder = encoders.load(name)
    online = OnlineText([inputs[name]], {name: encoder}, encoder.mesh)
    return online.of_captions(prepared, caption_ids).files
