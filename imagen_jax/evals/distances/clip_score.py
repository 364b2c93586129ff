"""The CLIP score: the mean cosine of the embeddings of image and caption.

A mean over independent prompts, so its standard error needs no jackknife.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from imagen_jax.evals.distances import guards
from imagen_jax.evals.distances.cmmd import unit
from imagen_jax.evals.statistics import summary

SCALE = 100.0


def cosines(
    images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " n"]:
    """The cosine of each image and its text."""
    return np.einsum("nd,nd->n", unit("images", images), unit("texts", texts))


def per_prompt(
    images: Float[np.ndarray, "n d"],
    texts: Float[np.ndarray, "n d"],
    prompts: Int[np.ndarray, " n"],
    scale: float = SCALE,
    clip: bool = False,
) -> Float[np.ndarray, " p"]:
    """The mean score of each prompt's images, in the order of the prompt ids.

    Two checkpoints are compared by the differences of these values.
    """
    values = scale * cosines(images, texts)
    values = np.maximum(values, 0) if clip else values
    _, inverse, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    return np.bincount(inverse, values) / counts


def score(
    images: Float[np.ndarray, "n d"],
    texts: Float[np.ndarray, "m k"],
    prompts: Int[np.ndarray, " n"],
    scale: float = SCALE,
    clip: bool = False,
) -> dict[str, Any]:
    """{"mean", "se", "n", "prompts", "scale", "clip", "warnings"}.

    texts: the embedding of each image's caption, in the order of the images.
    clip: replace negative cosines by 0, as torchmetrics does.

    Images of one prompt are averaged first. The standard error is over prompts.
    """
    guards.check("images", images)
    guards.check("texts", texts)
    if images.shape != texts.shape:
        raise ValueError(
            f"images have the shape {images.shape} and texts {texts.shape}; pass one text"
            " embedding per image, of the same CLIP model"
        )
    result = summary(per_prompt(images, texts, prompts, scale, clip))
    return {
        "mean": result["mean"],
        "se": result["se"],
        "n": len(images),
        "prompts": result["n"],
        "scale": scale,
        "clip": clip,
        "warnings": [],
    }
