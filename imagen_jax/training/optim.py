"""The optimizer of a run from its config (section 4.1, listings of Appendix F), and learning-rate
schedules.
"""

from collections.abc import Mapping
from typing import Any

import optax

OPTIMIZERS = ("adam", "adafactor")
DECAYS = ("constant", "cosine")


def learning_rate(optim: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` steps to `lr`, then constant, or a cosine to 0 at `steps`.

    The paper's listing decays to `end_value=2500000`, which cannot be meant; constant is the
    default reading.
    """
    if not optim["lr"] >= 0.0:
        raise ValueError(f"optim.lr is {optim['lr']}; it must not be negative")
    if optim["decay"] not in DECAYS:
        raise ValueError(f"optim.decay is {optim['decay']!r}; it must be one of {DECAYS}")
    if optim["decay"] == "cosine" and steps <= optim["warmup"]:
        raise ValueError(
            f"train.steps={steps} must exceed optim.warmup={optim['warmup']} for a cosine decay"
        )
    warmup = optax.linear_schedule(0.0, optim["lr"], optim["warmup"])
    rest = steps - optim["warmup"]
    after = (
        optax.constant_schedule(optim["lr"])
        if optim["decay"] == "constant"
        else optax.cosine_decay_schedule(optim["lr"], rest)
    )
    return optax.join_schedules([warmup, after], [optim["warmup"]])


def make_optimizer(optim: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then Adam (super-resolution) or optax's Adafactor with its defaults
    (the 2B base model).
    """
    rate = learning_rate(optim, steps)
    if not optim["clip"] > 0.0:
        raise ValueError(f"optim.clip is {optim['clip']}; it must be positive (inf: no clipping)")
    if optim["optimizer"] == "adam":
        update = optax.adamw(
            rate, optim["beta1"], optim["beta2"], optim["eps"], weight_decay=optim["weight_decay"]
        )
    elif optim["optimizer"] == "adafactor":
        update = optax.adafactor(rate, weight_decay_rate=optim["weight_decay"] or None)
    else:
        raise ValueError(
            f"optim.optimizer is {optim['optimizer']!r}; it must be one of {OPTIMIZERS}"
        )
    return optax.chain(optax.clip_by_global_norm(optim["clip"]), update)
