r"""Guidance weight against thresholding of x-hat (section 2.3, D.2, Figs. A.8 and A.10): sampling
only, one model for all arms.

    python -m launch.sweep --config configs/ablations/guidance_thresholding.py:demo \
        --config.data.path=PREPARED --workdir DIR

The paper: without thresholding large weights saturate the pictures, static thresholding clips them,
dynamic thresholding lets the weight grow and keeps them natural. The variants are those of
base_64.py; a model that is trained already: --checkpoint WORKDIR. Losses do not depend on sampling:
--measures retrieval leaves them out.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import base_64

WEIGHTS = (1.0, 2.0, 3.0, 5.0, 8.0)


def get_config(arg: str = "") -> ConfigDict:
    return base_64.get_config(arg)


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    """Every weight with every threshold, no guidance and no threshold first."""
    for threshold in ("none", "static", "dynamic"):
        for w in WEIGHTS:
            yield {
                "name": f"{threshold}_w{w:g}",
                "config.sampling.threshold": threshold,
                "config.sampling.w": w,
            }
