r"""Noise-conditioning augmentation of super-resolution, in training and sampling (D.2).

    python -m launch.sweep --config configs/ablations/noise_augmentation.py \
        --config.data.path=PREPARED --workdir DIR
    python -m launch.sweep --config configs/ablations/noise_augmentation.py:tiny \
        --config.data.path=data/emoji --workdir runs/augmentation

CPU: the second command runs all 5 arms with `:tiny`, about two minutes for each training with its
evaluation. Expect a table of all arms; after 8 steps its numbers mean nothing. `:demo` trains.

Two trainings for each seed. The paper: augmentation in training gives better FID and CLIP scores;
level 0 in sampling has the best FID, levels of 0.1 to 0.3 look best. Losses of the two are not
comparable, since each is measured with the noise of its own training; the error of x-hat from a
clean low-res image is (Figs. A.11 and A.12). The variants are those of sr_256.py.

Hardware: `:demo` two CPU cores, `:tiny` minutes on a CPU; without a variant, that of sr_256.py.
Expect: not run yet, so no result or time is known.
Recorded: nowhere yet; launch.sweep writes DIR/sweep.json.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import sr_256


def get_config(arg: str = "") -> ConfigDict:
    return sr_256.get_config(arg)


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    """Without augmentation first; that model is sampled at its only training level, 0."""
    yield {"name": "without", "config.diffusion.aug_max": 0.0, "config.sampling.aug_level": 0.0}
    for level in (0.0, 0.1, 0.2, 0.3):
        yield {
            "name": f"with_level{level:g}",
            "config.diffusion.aug_max": 1.0,
            "config.sampling.aug_level": level,
        }
