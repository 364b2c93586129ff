"""Text features that a run computes itself (`text.online`), in place of stored ones.

The data workers turn each caption into token ids, and the encoders run on the mesh of the run, as
programs of their own before the train step: their features never leave the devices. Weights are
sharded over the mesh as ENCODER_RULES say. All captions are padded to the length of the stage's
input, so that one program encodes every batch; padding changes the rounding of the features only.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Shaped

from imagen_jax import sharding
from imagen_jax.data.example_text import EncodedText, ExampleText, TokenText
from imagen_jax.data.records import Prepared
from imagen_jax.text.encoder import FlaxEncoder
from imagen_jax.text.encoder_list import parse_encoders
from imagen_jax.text.feature_file import MOST_PER_DEVICE, FeatureFile
from imagen_jax.text_inputs import MASK, POOLED, TEXT, TOKENS, TextInput, field_name, text_inputs
from imagen_jax.weights.text_encoders import load_text_encoder

# Captions whose features every device holds at once: 512 MiB of T5-XXL's at 128 tokens.
MOST_REPLICATED = 512


class OnlineText:
    """Text encoders on a mesh.

    identities: {text input: identity of its encoder}. tokens: how the pipeline reads captions.
    """

    def __init__(
        self, inputs: Sequence[TextInput], encoders: Mapping[str, FlaxEncoder], mesh: Mesh
    ):
        self._inputs, self._mesh = tuple(inputs), mesh
        names = [text_input.name for text_input in inputs]
        self._encoders = {name: encoders[name] for name in names}
        self.identities = {name: encoders[name].identity for name in names}
        tokenize = {name: encoders[name].tokenizing for name in names}
        self.tokens: ExampleText = TokenText(self._inputs, tokenize)
        self._masked = jax.jit(_masked, out_shardings=sharding.batch_sharding(mesh))

    @classmethod
    def load(cls, config: Mapping[str, Any], mesh: Mesh) -> "OnlineText":
        """Loads `text.online_encoder` in bfloat16; every process reads the weights.

        config: complete config of a stage.

        Raises ValueError if the encoders are not those of the stage's inputs.
        """
        named = named_encoders(config, config["text"]["online_encoder"])
        encoders = {
            text_input.name: load_encoder(text_input, given, lambda _: mesh)
            for text_input, given in named
        }
        return cls([text_input for text_input, _ in named], encoders, mesh)

    def features(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The text fields of a batch on the mesh, from its tokens and masks."""
        fields = {}
        for text_input in self._inputs:
            name = text_input.name
            tokens, mask = batch[field_name(TOKENS, name)], batch[field_name(MASK, name)]
            out, pooled = self._encoders[name].run(tokens, mask)
            fields[field_name(TEXT, name)] = self._masked(out, mask)
            fields[field_name(MASK, name)] = mask
            if text_input.pooled_dim:
                fields[field_name(POOLED, name)] = pooled
        return fields

    def place(self, batch: Mapping[str, Shaped[np.ndarray, "b ..."]]) -> dict[str, Array]:
        """The text fields on the mesh, from the tokens and masks of a host batch."""
        names = [field_name(kind, name) for name in self._encoders for kind in (TOKENS, MASK)]
        return self.features(
            sharding.place_batch({name: batch[name] for name in names}, self._mesh)
        )

    def warm_up(self, rows: int) -> None:
        """Compiles the encoding of global batches of `rows` captions, by encoding an empty one."""
        held = len(sharding.process_rows(rows, self._mesh))
        batch = {}
        for text_input in self._inputs:
            shape = held, text_input.length
            batch[field_name(TOKENS, text_input.name)] = np.zeros(shape, np.int32)
            batch[field_name(MASK, text_input.name)] = np.ones(shape, bool)
        jax.block_until_ready(self.place(batch))

    def of_captions(self, prepared: Prepared, caption_ids: Sequence[int]) -> EncodedText:
        """Features of certain captions, in temporary files. All processes call it together.

        A batch has few captions, whatever the batch of the run: each device holds its features.
        """
        captions, read = prepared.captions(), self.tokens.open(prepared)
        distinct = list({captions.text(int(i)): int(i) for i in caption_ids}.items())
        files = {
            text_input.name: FeatureFile(
                Path(tempfile.gettempdir()), text_input.dim, text_input.pooled_dim
            )
            for text_input in self._inputs
        }
        rows = rows_at_once(len(distinct), self._mesh)
        held, whole = sharding.process_rows(rows, self._mesh), sharding.replicated(self._mesh)
        for start in range(0, len(distinct), rows):
            chunk = distinct[start : start + rows]
            fields = [read(chunk[min(row, len(chunk) - 1)][1]) for row in held]
            batch = {name: np.stack([row[name] for row in fields]) for name in fields[0]}
            features = jax.device_get(jax.device_put(self.place(batch), whole))
            for name, file in files.items():
                _add(file, name, [text for text, _ in chunk], features)
        return EncodedText(self._inputs, files)

    def cut_shares(self, prepared: Prepared, most: int = 1000) -> dict[TextInput, float]:
        """{text input: share of captions that are longer}, of the first `most` captions."""
        captions = prepared.captions()
        texts = [captions.text(i) for i in range(min(most, len(captions)))]
        cuts = {one: self._encoders[one.name].tokenize(texts)[1] for one in self._inputs}
        return {one: sum(cut) / max(1, len(cut)) for one, cut in cuts.items()}


def rows_at_once(captions: int, mesh: Mesh) -> int:
    """Captions of a batch of `OnlineText.of_captions`, a multiple of data x fsdp."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    most = min(MOST_PER_DEVICE, max(1, MOST_REPLICATED // shards))
    return shards * max(1, min(most, -(-captions // shards)))


def _add(
    file: FeatureFile,
    name: str,
    texts: Sequence[str],
    features: Mapping[str, Shaped[np.ndarray, "b ..."]],
) -> None:
    """Stores the features of texts, without padding. features: the fields of a batch."""
    lengths = features[field_name(MASK, name)].sum(axis=1)
    pooled = features.get(field_name(POOLED, name))
    for i, text in enumerate(texts):
        tokens = features[field_name(TEXT, name)][i, : lengths[i]]
        file.add(text, tokens, None if pooled is None else pooled[i])


def named_encoders(
    config: Mapping[str, Any], given: str, field: str = "text.online_encoder"
) -> list[tuple[TextInput, str]]:
    """[(input of a stage, what is given for its encoder)].

    config: complete config of the stage. given: see `parse_encoders`. field: where it is given.

    Raises ValueError if the encoders are not those of the stage's inputs.
    """
    if not given:
        raise ValueError(f"there is no text encoder: set {field}=NAME")
    inputs, named = text_inputs(config), parse_encoders(given)
    wanted = [text_input.name for text_input in inputs]
    if named.keys() != set(wanted):
        listed = lambda names: ", ".join(filter(None, names)) or "one without a name"
        raise ValueError(
            f"{field} = {given} gives the encoders {listed(named)}, but the stage reads"
            f" {listed(wanted)}: name them as in text.encoders"
        )
    return [(text_input, named[text_input.name]) for text_input in inputs]


def load_encoder(
    text_input: TextInput, given: str, make_mesh: Callable[[int], Mesh]
) -> FlaxEncoder:
    """The encoder of an input. Raises ValueError if it has other widths or reads less."""
    length, field = text_input.length, text_input.length_field
    encoder = load_text_encoder(given, length, make_mesh=make_mesh, length_field=field)
    check_sizes(text_input, encoder, given)
    return encoder


def check_sizes(text_input: TextInput, encoder: Any, given: str) -> None:
    """Raises ValueError unless an encoder has the widths of a stage's input.

    encoder: with `.dim` and `.pooled_dim`.
    """
    suffix = "s" if text_input.name else ""
    if encoder.dim != text_input.dim:
        raise ValueError(
            f"text encoder {given} has features of width {encoder.dim}, but text.dim{suffix} has"
            f" {text_input.dim}: give another encoder, or {encoder.dim} in text.dim{suffix}"
        )
    if text_input.pooled_dim not in (0, encoder.pooled_dim):
        raise ValueError(
            f"text encoder {given} has a pooled vector of width {encoder.pooled_dim}, but"
            f" text.pooled_dims has {text_input.pooled_dim}: give another encoder, or"
            f" {encoder.pooled_dim} in text.pooled_dims"
        )


def _masked(features: Shaped[Array, "b l d"], mask: Bool[Array, "b l"]) -> Shaped[Array, "b l d"]:
    """Features with zeros in place of padding, as stored ones have."""
    return jnp.where(mask[..., None], features, 0)
