r"""Guidance weight and thresholding of x-hat (section 2.3, D.2, Figs. A.8 and A.10).

    python -m launch.sweep --config configs/ablations/guidance_thresholding.py \
        --config.data.path=PREPARED --workdir DIR
    python -m launch.sweep --config configs/ablations/guidance_thresholding.py:demo \
        --config.data.path=data/emoji --checkpoint embedded:base_16 --measures retrieval --rows 64 \
        --workdir runs/guidance

CPU: the second command evaluates 15 arms of the embedded base, at most a minute each, without
training. Expect a table of retrieval rates with their errors. `:tiny` is for tests.

Sampling only, one model for all arms. The paper: without thresholding large weights saturate the
pictures, static thresholding clips them, and dynamic thresholding keeps them natural at large
weights. The variants are those of base_64.py. `--checkpoint WORKDIR` uses a trained model. Losses
do not depend on sampling: --measures retrieval omits them.

Hardware: `:demo` two CPU cores, `:tiny` minutes on a CPU; without a variant, that of base_64.py.
Expect: not run yet, so no result or time is known.
Recorded: nowhere yet; launch.sweep writes DIR/sweep.json.
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
