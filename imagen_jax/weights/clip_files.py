"""CLIP in the Hugging Face layout: the check of config.json, tensor names, the tokenizer.

A file of both towers serves either. OpenAI's own archives are TorchScript and are not read.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from imagen_jax.storage import read_json
from imagen_jax.text import tokenizer as tokenizers
from imagen_jax.text.clip import ACTIVATIONS, EPSILON, MLP_RATIO, CLIPText, CLIPTextConfig
from imagen_jax.text.config_numbers import check_heads, read_numbers
from imagen_jax.text.program import parameter_shapes
from imagen_jax.weights.name_map import NameMap, map_tree, tensor_name

TOKENIZERS = {"tokenizer.json": "PreTrainedTokenizerFast", "vocab.json": "CLIPTokenizer"}
ACTIVATION = "quick_gelu"
TEXT_MODEL = "clip_text_model"  # model_type of a text tower alone
# transformers' defaults, which a config.json may leave out.
DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
BLOCK = {
    "attention_norm": "layer_norm1",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
TEXT = {
    "token_embedding": "text_model.embeddings.token_embedding.weight",
    "position_embedding": "text_model.embeddings.position_embedding.weight",
    "final_norm/scale": "text_model.final_layer_norm.weight",
    "final_norm/bias": "text_model.final_layer_norm.bias",
    "projection/kernel": "text_projection.weight",
}
IMAGE = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "patch_embedding/kernel": "vision_model.embeddings.patch_embedding.weight",
    "position_embedding": "vision_model.embeddings.position_embedding.weight",
    "pre_norm/scale": "vision_model.pre_layrnorm.weight",
    "pre_norm/bias": "vision_model.pre_layrnorm.bias",
    "post_norm/scale": "vision_model.post_layernorm.weight",
    "post_norm/bias": "vision_model.post_layernorm.bias",
    "projection/kernel": "visual_projection.weight",
}


def is_clip(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json describes a CLIP, or its text tower."""
    return config.get("model_type") in ("clip", TEXT_MODEL)


def read_text_config(raw: Mapping[str, Any]) -> CLIPTextConfig:
    """The text tower of a parsed config.json, of a CLIP or of the tower alone.

    The fields that end a text, such as eos_token_id, are wrong in older files and not used.

    Raises ValueError for a variant that is not supported.
    """
    fields = raw
    if raw["model_type"] != TEXT_MODEL:
        # As in transformers, the older of the two fields replaces the other.
        fields = raw.get("text_config_dict") or raw.get("text_config") or {}
        if not isinstance(fields, Mapping):
            raise ValueError("text_config is not an object: download the file again")
        fields = {**fields, "projection_dim": raw.get("projection_dim", 512)}
    sizes = read_numbers(fields, (), DEFAULTS, "CLIP")
    width = sizes["hidden_size"]
    activation = fields.get("hidden_act", ACTIVATION)
    fixed = {"layer_norm_eps": EPSILON, "intermediate_size": MLP_RATIO * width}
    wrong = {name: fields[name] for name in fixed if fields.get(name, fixed[name]) != fixed[name]}
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act is {activation!r}: only {', '.join(ACTIVATIONS)} are supported"
        )
    for name, value in wrong.items():
        raise ValueError(f"{name} is {value!r}: only {fixed[name]!r} is supported here")
    check_heads(width, sizes["num_attention_heads"])
    return CLIPTextConfig(
        width=width,
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        projection_dim=sizes["projection_dim"],
        vocab_size=sizes["vocab_size"],
        max_length=sizes["max_position_embeddings"],
        activation=activation,
    )


def encoder_map(config: CLIPTextConfig) -> NameMap:
    """The map of a text encoder; a file of the text tower alone may lack the prefix."""
    names = text_map(parameter_shapes(CLIPText(config), "float32"))
    aliases = {name.removeprefix("text_model."): name for name in names.slots}
    return NameMap(
        names.slots,
        names.covers,
        {short: name for short, name in aliases.items() if short != name},
        {TEXT["projection/kernel"]: "choose the pooled vector without it, NAME@pooling=end"},
    )


def text_map(shapes: Mapping[str, Any]) -> NameMap:
    """The map from Hugging Face tensor names to the parameters of CLIPText."""
    return _tower(shapes, TEXT, "text_model", "text_projection.")


def image_map(shapes: Mapping[str, Any]) -> NameMap:
    """The map from Hugging Face tensor names to the parameters of CLIPImage."""
    return _tower(shapes, IMAGE, "vision_model", "visual_projection.")


def check_config(path: pathlib.Path) -> None:
    """Raises ValueError if the config.json beside the weights describes another variant of CLIP.

    A CLIP of other authors may have the tensors of OpenAI's and another activation.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return
    raw = read_json(file)
    for tower in ("text_config", "vision_config"):
        fields = raw.get(tower) if isinstance(raw, dict) else None
        activation = fields.get("hidden_act") if isinstance(fields, dict) else None
        if activation not in (None, ACTIVATION):
            raise ValueError(
                f"{file} has {tower}.hidden_act {activation!r}: only OpenAI's CLIP ({ACTIVATION!r})"
                " is supported"
            )


def load_tokenizer(directory: pathlib.Path) -> tuple[Any, str]:
    """(tokenizer of a directory, SHA-256 of its file).

    Raises:
        FileNotFoundError: the directory has none.
        ValueError: it cannot be read, or does not put each text between a start and an end token.
    """
    tokenizer, file, sha256 = tokenizers.load_tokenizer(directory, TOKENIZERS)
    tokenizers.set_end_token(tokenizer, file, "CLIP")
    return tokenizer, sha256


def _tower(shapes: Mapping[str, Any], names: Mapping[str, str], tower: str, head: str) -> NameMap:
    rename = lambda path: tensor_name(path, names, f"{tower}.encoder.layers", BLOCK)

    def covers(name: str) -> bool:
        """Older files also store `position_ids`, which are 0, 1, 2 ..."""
        if name.startswith(head):
            return "projection" in shapes
        return name.startswith(f"{tower}.") and not name.endswith("position_ids")

    return map_tree(shapes, rename, covers)
