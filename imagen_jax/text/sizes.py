"""Sizes of published text encoders, for plans and networks without files.

Sources: the config.json of each model; CLIP B/32 and L/14 Radford et al. 2021 table 19, bigG
OpenCLIP's ViT-bigG-14.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from imagen_jax.text.bert_network import Bert, BertConfig
from imagen_jax.text.choice import Choice
from imagen_jax.text.clip import CLIPText, CLIPTextConfig
from imagen_jax.text.t5_network import RELU, T5Config, T5Encoder

_v11 = functools.partial(T5Config, d_kv=64, vocab_size=32_128)
_original = functools.partial(T5Config, vocab_size=32_128, feed_forward_proj=RELU)
_bert = functools.partial(BertConfig, vocab_size=30_522)

T5_V11 = {
    "small": _v11(d_model=512, d_ff=1024, num_heads=6, num_layers=8),
    "base": _v11(d_model=768, d_ff=2048, num_heads=12, num_layers=12),
    "large": _v11(d_model=1024, d_ff=2816, num_heads=16, num_layers=24),
    "xl": _v11(d_model=2048, d_ff=5120, num_heads=32, num_layers=24),
    "xxl": _v11(d_model=4096, d_ff=10_240, num_heads=64, num_layers=24),
}
T5_ORIGINAL = {
    "small": _original(d_model=512, d_ff=2048, d_kv=64, num_heads=8, num_layers=6),
    "base": _original(d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12),
    "large": _original(d_model=1024, d_ff=4096, d_kv=64, num_heads=16, num_layers=24),
    "3b": _original(d_model=1024, d_ff=16_384, d_kv=128, num_heads=32, num_layers=24),
    "11b": _original(d_model=1024, d_ff=65_536, d_kv=128, num_heads=128, num_layers=24),
}
BERT = {
    "bert-base": _bert(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
    "bert-large": _bert(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}
CLIP = {
    "clip-b32": CLIPTextConfig(width=512, layers=12, heads=8, projection_dim=512),
    "clip-l14": CLIPTextConfig(width=768, layers=12, heads=12, projection_dim=768),
    "clip-l14-336": CLIPTextConfig(width=768, layers=12, heads=12, projection_dim=768),
    "clip-bigg": CLIPTextConfig(
        width=1280, layers=32, heads=20, projection_dim=1280, activation="gelu"
    ),
}
# Short name -> sizes. T5 v1.1 also has its size alone as a name.
SIZES = {
    **T5_V11,
    **{f"t5-v1_1-{size}": config for size, config in T5_V11.items()},
    **{f"flan-t5-{size}": config for size, config in T5_V11.items()},
    **{f"t5-{size}": config for size, config in T5_ORIGINAL.items()},
    **BERT,
    **CLIP,
}
# Hub name without its owner -> short name, where they differ.
HUB = {
    "bert-base-uncased": "bert-base",
    "bert-large-uncased": "bert-large",
    "clip-vit-base-patch32": "clip-b32",
    "clip-vit-large-patch14": "clip-l14",
    "clip-vit-large-patch14-336": "clip-l14-336",
    "CLIP-ViT-bigG-14-laion2B-39B-b160k": "clip-bigg",
}
OWNERS = ("google", "google-t5", "google-bert", "openai", "laion")


NETWORKS = {T5Config: T5Encoder, BertConfig: Bert, CLIPTextConfig: CLIPText}


def network(name: str, dtype: str, choice: Choice) -> nn.Module:
    """The network of a published encoder. name: of SIZES.

    Raises ValueError if the encoder has no such features.
    """
    config = SIZES[name].with_choice(choice)
    return NETWORKS[type(config)](config, jnp.dtype(dtype))


def short_name(hub_name: str) -> str | None:
    """The short name of a published encoder, given as OWNER/NAME; None if it is unknown."""
    owner, _, name = hub_name.partition("/")
    name = HUB.get(name, name)
    return name if owner in OWNERS and name in SIZES else None
