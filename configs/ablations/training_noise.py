r"""Training noise and prediction of the base model, compared with the paper's choice (Appendix A).

    python -m launch.sweep --config configs/ablations/training_noise.py \
        --config.data.path=PREPARED --workdir DIR
    python -m launch.sweep --config configs/ablations/training_noise.py:tiny \
        --config.data.path=data/emoji --workdir runs/noise

CPU: the second command runs all 7 arms with `:tiny`, about two minutes for each training with its
evaluation. Expect a table of all arms; after 8 steps its numbers mean nothing. `:demo` trains.

One training for each arm. Their losses are not comparable; the table compares the error of x-hat in
fixed bins of log-SNR. Sampling uses the schedule of the arm. The variants are those of
base_64.py; without one, the 300M model.

Hardware: `:demo` two CPU cores, `:tiny` minutes on a CPU; the 300M model was not planned.
Expect: not run yet, so no result or time is known.
Recorded: nowhere yet; launch.sweep writes DIR/sweep.json.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import base_64


def get_config(arg: str = "") -> ConfigDict:
    return base_64.get_config(arg or "width=192")


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    """The paper's eps with uniform time and the cosine schedule first."""
    paper = dict(
        prediction="eps", schedule="cosine", density="uniform", process="vp", weight="none"
    )
    changes = {
        "paper": {},
        "linear": {"schedule": "linear"},
        "logit_normal": {"density": "logit_normal"},
        # JiT (Li & He 2025), whose time runs from noise to data: mean -0.8 there.
        "logit_normal_noisy": {
            "density": "logit_normal",
            "density_mean": 0.8,
            "density_std": 0.8,
        },
        "min_snr": {"weight": "min_snr"},
        "v": {"prediction": "v"},
        "flow": {"process": "flow", "schedule": "flow", "prediction": "u"},
    }
    for name, changed in changes.items():
        yield {"name": name} | {
            f"config.diffusion.{field}": value for field, value in (paper | changed).items()
        }
