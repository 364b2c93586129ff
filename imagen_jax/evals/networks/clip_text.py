"""Captions to CLIP features, for the CLIP score; the image side is in `network.py`.

captions = load("clip-l14", "weights/clip-vit-large-patch14").features(["a red apple"])
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from imagen_jax import sharding
from imagen_jax.evals.networks.network import NETWORKS, feature_program, load_parameters
from imagen_jax.storage import check_local
from imagen_jax.text import sizes
from imagen_jax.text.clip import CLIPText
from imagen_jax.text.tokenizer import tokenize
from imagen_jax.weights import clip_files
from imagen_jax.weights.text_encoders import local_mesh

BATCH_SIZE = 64  # captions per device
TOWERS = {name: sizes.CLIP[name] for name in ("clip-b32", "clip-l14", "clip-l14-336")}


@dataclasses.dataclass(frozen=True)
class CaptionNetwork:
    """A text tower with its weights.

    name: of TOWERS.
    dim: features per caption.
    identity: JSON: network, dim, max_length, tokenizer_sha256, file, sha256, weights_sha256.
    tokenizer: a transformers tokenizer.
    apply: (tokens, mask) on the mesh -> features.
    mesh: the devices; rows of a batch are split over them.
    """

    name: str
    dim: int
    identity: Mapping[str, Any]
    tokenizer: Any
    apply: Callable
    mesh: Mesh

    def features(
        self, captions: list[str], batch_size: int = BATCH_SIZE
    ) -> Float32[np.ndarray, "n d"]:
        """Features of captions, in their order; not normed to unit length.

        A caption that is too long is cut and keeps its end token. batch_size: captions per device;
        every batch has this size, so that a row depends on its caption alone.
        """
        if not captions:
            raise ValueError("no captions: the text tower needs at least one")
        length = self.identity["max_length"]
        texts, _ = tokenize(self.tokenizer, captions, length)
        rows, out = batch_size * self.mesh.size, []
        for start in range(0, len(texts), rows):
            batch = np.zeros((rows, length), np.int32)
            mask = np.zeros((rows, length), bool)
            for i, text in enumerate(texts[start : start + rows]):
                batch[i, : len(text)] = text
                mask[i, : len(text)] = True
            placed = sharding.place_batch({"tokens": batch, "mask": mask}, self.mesh)
            out.append(np.asarray(self.apply(placed["tokens"], placed["mask"])))
        return np.concatenate(out)[: len(texts)]


def load(name: str, path: str, make_mesh: Callable[[int], Mesh] = local_mesh) -> CaptionNetwork:
    """Loads the text tower and the tokenizer of a CLIP from a directory in Hugging Face's layout.

    Raises:
        FileNotFoundError: the directory, its weights or its tokenizer are absent.
        ValueError: the name is unknown, or a file is damaged or of another network.
    """
    if name not in TOWERS:
        raise ValueError(f"text tower {name!r}: choose one of {', '.join(TOWERS)}")
    check_local(f"weights of {name}", path)
    directory, config = pathlib.Path(path).expanduser(), TOWERS[name]
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{path} is not a directory: the text tower of {name} needs weights and tokenizer,"
            f" {NETWORKS[name].source}"
        )
    clip_files.check_config(directory)
    tokenizer, tokenizer_sha256 = clip_files.load_tokenizer(directory)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens, {name} has {config.vocab_size}:"
            f" {name} needs {NETWORKS[name].source}"
        )
    row = jax.ShapeDtypeStruct((1, config.max_length), jnp.int32)
    valid = jax.ShapeDtypeStruct((1, config.max_length), jnp.bool)
    params, mesh, weights = load_parameters(
        name,
        CLIPText(config),
        (row, valid),
        clip_files.text_map,
        directory,
        NETWORKS[name].source,
        make_mesh,
    )
    identity = {
        "network": name,
        "dim": config.projection_dim,
        "max_length": config.max_length,
        "tokenizer_sha256": tokenizer_sha256,
    } | weights
    apply = feature_program(CLIPText(config), params, mesh)
    pooled = lambda tokens, mask: apply(tokens, mask)[1]
    return CaptionNetwork(name, config.projection_dim, identity, tokenizer, pooled, mesh)
