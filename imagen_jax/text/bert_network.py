"""The BERT encoder network in Flax (Devlin et al. 2019); the paper ablates two sizes of it.

A bidirectional post-norm transformer with exact GELU, and learned positions and token types. A text
is one segment, of type 0. Parameters are a plain nested dict; `weights/bert_files.py` maps each to
its Hugging Face name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.text import choice as choices
from imagen_jax.text.clip import MLP, SelfAttention, gelu, layer_norm
from imagen_jax.text.config_numbers import check_heads, read_numbers

# Kinds of the pooled vector, both of the last layer: the feature of the first token, [CLS], or the
# mean over all tokens of the text. The pooler, trained to tell the next sentence, is not used.
POOLINGS = ("cls", "mean")
REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
DEFAULTS = {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
# Fields of config.json whose other values are other networks.
FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT, with the field names of a Hugging Face config.json, and the chosen features.

    layer: whose output the features are; 0 is the embeddings, None the last one.
    pooling: of POOLINGS.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int = DEFAULTS["max_position_embeddings"]
    type_vocab_size: int = DEFAULTS["type_vocab_size"]
    layer_norm_eps: float = DEFAULTS["layer_norm_eps"]
    layer: int | None = None
    pooling: str = "cls"

    @property
    def dim(self) -> int:
        """Features per token."""
        return self.hidden_size

    @property
    def pooled_dim(self) -> int:
        """Features of the pooled vector."""
        return self.hidden_size

    @property
    def max_length(self) -> int:
        """Tokens of the longest text, including [CLS] and [SEP]."""
        return self.max_position_embeddings

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the features beside weights and tokenizer."""
        return {
            "family": "bert",
            "layer": self.num_hidden_layers if self.layer is None else self.layer,
            "pooling": self.pooling,
            "pooled_dim": self.pooled_dim,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "BertConfig":
        """Reads a parsed Hugging Face config.json. Raises ValueError for another network's."""
        for field, value in FIXED.items():
            if raw.get(field, value) != value:
                raise ValueError(f"{field} is {raw[field]!r}: only {value!r} is supported")
        sizes = read_numbers(raw, REQUIRED, DEFAULTS, "BERT")
        check_heads(sizes["hidden_size"], sizes["num_attention_heads"])
        return cls(**sizes)

    def with_choice(self, choice: choices.Choice) -> "BertConfig":
        """The config with the chosen features, by default the last layer and [CLS].

        Raises ValueError if the encoder has no such features.
        """
        choice.refuse(("final_norm",), "BERT")
        layer = -1 if choice.layer is None else choice.layer
        return dataclasses.replace(
            self,
            layer=choices.resolve_layer(layer, self.num_hidden_layers),
            pooling=choices.check_pooling(choice.pooling or POOLINGS[0], POOLINGS),
        )


class Block(nn.Module):
    """Attention and MLP, each followed by a residual sum and a norm; both are fp32."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], visible: Bool[Array, "b 1 l"]
    ) -> Float[Array, "b l d"]:
        c = self.config
        y = SelfAttention(c.num_attention_heads, self.dtype, name="attention")(x, visible)
        x = layer_norm("attention_norm", c.layer_norm_eps, jnp.float32)(x + y)
        y = MLP(c.intermediate_size, gelu, self.dtype, name="mlp")(x)
        return layer_norm("mlp_norm", c.layer_norm_eps, jnp.float32)(x + y)


class Bert(nn.Module):
    """Token ids and mask (True = a token) to (features per token, pooled vector), both fp32.

    dtype: of the products. Features at masked positions are undefined; each text needs a token.
    """

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b d"]]:
        c, width = self.config, self.config.hidden_size

        def table(name, rows):
            return self.param(name, nn.initializers.normal(0.02), (rows, width))

        x = jnp.take(table("token_embedding", c.vocab_size), tokens, axis=0).astype(jnp.float32)
        x = x + table("type_embedding", c.type_vocab_size)[None, :1].astype(jnp.float32)
        positions = table("position_embedding", c.max_position_embeddings)
        x = x + positions[None, : tokens.shape[1]].astype(jnp.float32)
        states = [layer_norm("embedding_norm", c.layer_norm_eps, jnp.float32)(x)]
        for i in range(c.num_hidden_layers):
            block = Block(c, self.dtype, name=f"block_{i}")
            states.append(block(states[-1], mask[:, None, :]))
        last = states[-1]
        pooled = last[:, 0]
        if c.pooling == "mean":
            weights = mask[:, :, None].astype(jnp.float32)
            pooled = (last * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)
        return states[-1 if c.layer is None else c.layer], pooled
