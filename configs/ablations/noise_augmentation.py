r"""Noise-conditioning augmentation in super-resolution: with and without it in training, and its
level in sampling (D.2, Figs. A.11 and A.12).

    python -m launch.sweep --config configs/ablations/noise_augmentation.py:demo \
        --config.data.path=PREPARED --workdir DIR

Two trainings a seed. The paper: augmentation in training gives better FID and CLIP scores; level 0
in sampling has the best FID, 0.1 to 0.3 looks best. Losses of the two are not comparable, since
each is taken with the noise of its own training; the error of x-hat from a clean low-res image is.
The variants are those of sr_256.py.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import sr_256


def get_config(arg: str = "") -> ConfigDict:
    return sr_256.get_config(arg)


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    """Without augmentation first; a level that a model never saw in training is not asked of it."""
    yield {"name": "without", "config.diffusion.aug_max": 0.0, "config.sampling.aug_level": 0.0}
    for level in (0.0, 0.1, 0.2, 0.3):
        yield {
            "name": f"with_level{level:g}",
            "config.diffusion.aug_max": 1.0,
            "config.sampling.aug_level": level,
        }
