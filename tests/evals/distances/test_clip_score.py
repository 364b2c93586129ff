"""The CLIP score against values worked out by hand."""

import json

import numpy as np
import pytest

from imagen_jax.evals import statistics
from imagen_jax.evals.distances import clip_score

IMAGES = np.array([[3.0, 4], [1, 0], [0, 2], [1, 1]])
TEXTS = np.array([[1.0, 0], [5, 0], [0, -1], [0, 3]])
COSINES = [0.6, 1.0, -1.0, np.sqrt(0.5)]


@pytest.mark.parametrize("clip, third", [(False, -100.0), (True, 0.0)])
def test_score_is_the_mean_cosine_times_100(clip, third):
    """Catches inner products without normalisation, and clipping of the mean instead of values."""
    result = clip_score.score(IMAGES, TEXTS, np.arange(4), clip=clip)
    values = np.array([60, 100, third, 100 * np.sqrt(0.5)])
    assert result["mean"] == pytest.approx(values.mean())
    assert result["se"] == pytest.approx(statistics.summary(values)["se"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_images_of_a_prompt_count_once():
    """Catches a standard error over images, which are alike within a prompt."""
    prompts = np.array([7, 2, 7, 2])
    values = clip_score.per_prompt(IMAGES, TEXTS, prompts, scale=1.0)
    wanted = [(COSINES[1] + COSINES[3]) / 2, (COSINES[0] + COSINES[2]) / 2]
    np.testing.assert_allclose(values, wanted)
    result = clip_score.score(IMAGES, TEXTS, prompts, scale=1.0)
    assert result["se"] == pytest.approx(abs(wanted[0] - wanted[1]) / 2)
    assert (result["n"], result["prompts"]) == (4, 2)


def test_captions_of_other_images_or_models_are_refused():
    """Catches embeddings broadcast against each other."""
    with pytest.raises(ValueError, match="one text embedding per image"):
        clip_score.score(IMAGES, TEXTS[:3], np.arange(4))
    with pytest.raises(ValueError, match="texts: 1 of 4 images have non-finite"):
        clip_score.score(IMAGES, np.where(TEXTS == 5, np.nan, TEXTS), np.arange(4))
