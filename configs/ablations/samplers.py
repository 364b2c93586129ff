r"""Samplers, grids of noise levels and intervals of guidance at equal steps: sampling only, one
model for all arms.

    python -m launch.sweep --config configs/ablations/samplers.py:demo \
        --config.data.path=PREPARED --workdir DIR

The paper uses ancestral sampling and DDIM on a uniform grid (Appendix A). The variants are those of
base_64.py; a model that is trained already: --checkpoint WORKDIR. Losses do
not depend on sampling: --measures retrieval leaves them out.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import base_64


def get_config(arg: str = "") -> ConfigDict:
    return base_64.get_config(arg)


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    """Every sampler with every grid, ancestral on the uniform grid first; then guidance in an
    interval.
    """
    for method in ("ancestral", "ddim", "dpmpp_2m"):
        for grid in ("t", "logsnr", "karras"):
            yield {
                "name": f"{method}_{grid}",
                "config.sampling.method": method,
                "config.sampling.grid": grid,
            }
    yield {
        "name": "ancestral_t_interval",
        "config.sampling.method": "ancestral",
        "config.sampling.w_interval": (-2.129, 2.546),
    }
