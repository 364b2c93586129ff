"""Text features that a run computes itself (`text.online`), in place of stored ones.

The data workers turn each caption into token ids, and the encoders run on the mesh of the run, as
programs of their own before the train step: their features never leave the devices. Weights are
sharded over the mesh as ENCODER_RULES say. All captions are padded to the length of the stage's
input, so that one program encodes every batch; padding changes the rounding of the features only.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Shaped

from imagen_jax import encoder_identity, sharding
from imagen_jax.data.example_text import ExampleText, Fields, Reading, TextOf, read_stored
from imagen_jax.data.records import CaptionStore, Prepared
from imagen_jax.data.transforms import pad_text
from imagen_jax.row_batches import rows_per_batch
from imagen_jax.text.encoder import FlaxEncoder
from imagen_jax.text.feature_file import FeatureFile
from imagen_jax.text.several import parse_encoders
from imagen_jax.text_inputs import MASK, POOLED, TEXT, TextInput, key, text_inputs
from imagen_jax.weights.text_encoders import load_text_encoder

TOKENS = "tokens"
Tokenize = Callable[[list[str]], tuple[list[list[int]], list[bool]]]


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
        text, fields = self.captions[caption_id].text, {}
        for one in self.inputs:
            (row,), _ = self.tokenize[one.name]([text])
            tokens = np.zeros(one.length, np.int32)
            tokens[: len(row)] = row
            fields[key(TOKENS, one.name)] = tokens
            fields[key(MASK, one.name)] = np.arange(one.length) < len(row)
        return fields


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """Features of certain captions, encoded before: an `ExampleText` as `StoredText`.

    files: {text input: features by text}.
    """

    inputs: Sequence[TextInput]
    files: Mapping[str, FeatureFile]

    def open(self, prepared: Prepared) -> TextOf:
        """See `ExampleText`."""
        captions = prepared.captions()

        def fields(caption_id: int) -> Fields:
            text, out = captions[caption_id].text, {}
            for one in self.inputs:
                features = self.files[one.name][text]
                out[key(TEXT, one.name)], out[key(MASK, one.name)] = pad_text(
                    features.embedding, one.length
                )
                if one.pooled_dim:
                    out[key(POOLED, one.name)] = features.pooled
            return out

        return fields


class OnlineText:
    """The text encoders of a run on its mesh.

    identities: {text input: identity of its encoder}. tokens: how the pipeline reads captions.
    """

    def __init__(
        self, inputs: Sequence[TextInput], encoders: Mapping[str, FlaxEncoder], mesh: Mesh
    ):
        self._inputs, self._encoders, self._mesh = tuple(inputs), dict(encoders), mesh
        self.identities = {one.name: encoders[one.name].identity for one in inputs}
        tokenize = {one.name: encoders[one.name].tokenizing for one in inputs}
        self.tokens: ExampleText = TokenText(self._inputs, tokenize)
        self._masked = jax.jit(_masked)

    @classmethod
    def load(cls, config: Mapping[str, Any], mesh: Mesh) -> "OnlineText":
        """Loads the encoders of `text.encoder` in bfloat16; every process reads the weights.

        config: complete config of a stage.

        Raises ValueError if the encoders are not those of the stage's inputs.
        """
        named, encoders = named_encoders(config, config["text"]["encoder"]), {}
        for one, given in named:
            field = "text.lengths" if one.name else "data.text_length"
            encoder = load_text_encoder(
                given, one.length, make_mesh=lambda _: mesh, length_field=field
            )
            check_sizes(one, encoder, given)
            encoders[one.name] = encoder
        return cls([one for one, _ in named], encoders, mesh)

    def features(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The text fields of a batch on the mesh, from its tokens and masks."""
        fields = {}
        for one in self._inputs:
            tokens, mask = batch[key(TOKENS, one.name)], batch[key(MASK, one.name)]
            out, pooled = self._encoders[one.name].run(tokens, mask)
            fields[key(TEXT, one.name)] = self._masked(out, mask)
            fields[key(MASK, one.name)] = mask
            if one.pooled_dim:
                fields[key(POOLED, one.name)] = pooled
        return fields

    def place(self, batch: Mapping[str, Shaped[np.ndarray, "b ..."]]) -> dict[str, Array]:
        """The text fields on the mesh, from the tokens and masks of a host batch."""
        names = [key(kind, one.name) for one in self._inputs for kind in (TOKENS, MASK)]
        return self.features(
            sharding.place_batch({name: batch[name] for name in names}, self._mesh)
        )

    def warm_up(self, rows: int) -> None:
        """Compiles the encoding of global batches of `rows` captions, by encoding an empty one."""
        held = len(sharding.process_rows(rows, self._mesh))
        batch = {}
        for one in self._inputs:
            batch[key(TOKENS, one.name)] = np.zeros((held, one.length), np.int32)
            batch[key(MASK, one.name)] = np.ones((held, one.length), bool)
        jax.block_until_ready(self.place(batch))

    def of_captions(self, prepared: Prepared, caption_ids: Sequence[int], rows: int) -> EncodedText:
        """Features of certain captions, in temporary files. All processes call it together.

        rows: captions of a batch, a multiple of data x fsdp.
        """
        captions, read = prepared.captions(), self.tokens.open(prepared)
        ids = {captions[int(number)].text: int(number) for number in caption_ids}
        files = {
            one.name: FeatureFile(Path(tempfile.gettempdir()), one.dim, one.pooled_dim)
            for one in self._inputs
        }
        held, whole = sharding.process_rows(rows, self._mesh), sharding.replicated(self._mesh)
        numbers = list(ids.values())
        for start in range(0, len(numbers), rows):
            chunk = numbers[start : start + rows]
            fields = [read(chunk[min(row, len(chunk) - 1)]) for row in held]
            batch = {name: np.stack([row[name] for row in fields]) for name in fields[0]}
            features = jax.device_get(jax.device_put(self.place(batch), whole))
            for i, text in enumerate(list(ids)[start : start + len(chunk)]):
                for one in self._inputs:
                    length = int(features[key(MASK, one.name)][i].sum())
                    tokens = features[key(TEXT, one.name)][i, :length]
                    pooled = features.get(key(POOLED, one.name), _NONE)
                    files[one.name].add(text, tokens, pooled[i] if one.pooled_dim else _NONE)
        return EncodedText(self._inputs, files)

    def cut_share(self, prepared: Prepared, most: int = 1000) -> float:
        """The share of captions longer than a stage's input, of the first `most` captions."""
        captions = prepared.captions()
        texts = [captions[i].text for i in range(min(most, len(captions)))]
        cuts = [cut for encoder in self._encoders.values() for cut in encoder.tokenize(texts)[1]]
        return sum(cuts) / max(1, len(cuts))


def reading_of(
    config: Mapping[str, Any],
    trained: Mapping[str, Any],
    prepared: Prepared,
    mesh: Mesh,
    batch_size: int,
    encoder: str = "",
) -> Reading:
    """How an evaluation reads text: stored features, or computed ones of data with texts alone.

    config: complete config of the stage. trained: identity of its text encoders. batch_size:
        captions per batch. encoder: the text encoders to compute with; "": those of `text.encoder`.

    Raises ValueError if stored features or the given encoders are not those of the training.
    """
    inputs = text_inputs(config)
    if not inputs:
        return read_stored(inputs)
    names, identities = [one.name for one in inputs], encoder_identity.from_record(trained)
    remedy = "give the text encoder of the checkpoint"
    if prepared.encoders:
        prepared.check_text(inputs)
        who = f"{prepared.path} and the checkpoint"
        encoder_identity.check_same(names, prepared.encoders, identities, who, remedy)
        return read_stored(inputs)
    given = encoder or config["text"]["encoder"]
    if not given:
        raise ValueError(
            f"{prepared.path} has only the texts of its captions: give --encoder, the text encoder"
            " of the checkpoint"
        )
    text = dict(config["text"]) | {"encoder": given}
    online = OnlineText.load(dict(config) | {"text": text}, mesh)
    who = f"{given} and the checkpoint"
    encoder_identity.check_same(names, online.identities, identities, who, remedy)
    rows = rows_per_batch(batch_size, mesh)
    return lambda prepared, caption_ids: online.of_captions(prepared, caption_ids, rows)


_NONE = np.zeros(0, ml_dtypes.bfloat16)


def named_encoders(config: Mapping[str, Any], given: str) -> list[tuple[TextInput, str]]:
    """[(input of a stage, what is given for its encoder)].

    config: complete config of the stage. given: see `parse_encoders`.

    Raises ValueError if the encoders are not those of the stage's inputs.
    """
    if not given:
        raise ValueError("text.online needs an encoder: set text.encoder=NAME")
    inputs, named = text_inputs(config), parse_encoders(given)
    wanted = [one.name for one in inputs]
    if named.keys() != set(wanted):
        listed = lambda names: ", ".join(filter(None, names)) or "one without a name"
        raise ValueError(
            f"text.encoder = {given} gives the encoders {listed(named)}, but the stage reads"
            f" {listed(wanted)}: name them as in text.encoders"
        )
    return [(one, named[one.name]) for one in inputs]


def check_sizes(one: TextInput, encoder: Any, given: str) -> None:
    """Raises ValueError unless an encoder has the widths of a stage's input.

    encoder: with `.dim` and `.pooled_dim`.
    """
    suffix = "s" if one.name else ""
    if encoder.dim != one.dim:
        raise ValueError(
            f"text encoder {given} has features of width {encoder.dim}, but text.dim{suffix} has"
            f" {one.dim}"
        )
    if one.pooled_dim not in (0, encoder.pooled_dim):
        raise ValueError(
            f"text encoder {given} has a pooled vector of width {encoder.pooled_dim}, but"
            f" text.pooled_dims has {one.pooled_dim}"
        )


def _masked(features: Shaped[Array, "b l d"], mask: Bool[Array, "b l"]) -> Shaped[Array, "b l d"]:
    """Features with zeros in place of padding, as stored ones have."""
    return jnp.where(mask[..., None], features, 0)
