r"""Samplers, step spacings and guidance intervals at equal steps.

    python -m launch.sweep --config configs/ablations/samplers.py \
        --config.data.path=PREPARED --workdir DIR
    python -m launch.sweep --config configs/ablations/samplers.py:demo \
        --config.data.path=data/emoji --checkpoint embedded:base_16 --measures retrieval --rows 64 \
        --workdir runs/samplers

CPU: the second command evaluates 10 arms of the embedded base, at most a minute each, without
training. Expect a table of retrieval rates with their errors. `:tiny` is for tests.

Sampling only, one model for all arms. The paper uses ancestral sampling and DDIM on a uniform grid
(Appendix A). The variants are those of base_64.py. `--checkpoint WORKDIR` uses a trained model.
Losses do not depend on sampling: --measures retrieval omits them.

Hardware: `:demo` two CPU cores, `:tiny` minutes on a CPU; without a variant, that of base_64.py.
Expect: not run yet, so no result or time is known.
Recorded: nowhere yet; launch.sweep writes DIR/sweep.json.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import base_64


def get_config(arg: str = "") -> ConfigDict:
    return base_64.get_config(arg)


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    """Every sampler with every grid, ancestral on the uniform grid first; then guidance in an
    interval of log-SNR.
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
