"""The optimizer and the learning-rate schedule of a run (section 4.1, listings of Appendix F)."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, Int


def learning_rate(optim: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` steps to `lr`, then constant, or a cosine to 0 at `steps`.

    The paper's listing decays to `end_value=2500000`, which is no learning rate; constant is the
    default reading. Raises ValueError if a cosine has no steps after the warm-up.
    """
    if optim["decay"] == "cosine" and steps <= optim["warmup"]:
        raise ValueError(
            f"train.steps={steps} must exceed optim.warmup={optim['warmup']} for a cosine decay"
        )
    warmup = optax.linear_schedule(0.0, optim["lr"], optim["warmup"])
    after = {
        "constant": lambda: optax.constant_schedule(optim["lr"]),
        "cosine": lambda: optax.cosine_decay_schedule(optim["lr"], steps - optim["warmup"]),
    }[optim["decay"]]()
    return optax.join_schedules([warmup, after], [optim["warmup"]])


def make_optimizer(optim: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then Adam (super-resolution) or optax's Adafactor with its defaults
    (the 2B base model; section 4.1).

    Adam: Kingma & Ba 2015, algorithm 1, with decoupled weight decay (Loshchilov & Hutter 2019).
    Adafactor: Shazeer & Stern 2018. Clipping: g min(1, clip / |g|) (Pascanu et al. 2013).

    Weight decay acts on kernels only (see `kernels`); it is multiplied by the learning rate with
    Adam, not with Adafactor.
    """
    rate, decay = learning_rate(optim, steps), optim["weight_decay"]
    mask = kernels if decay else None  # without decay, resumes compile the program of older runs
    update = {
        "adam": lambda: optax.adamw(
            rate, optim["beta1"], optim["beta2"], optim["eps"], weight_decay=decay, mask=mask
        ),
        "adafactor": lambda: optax.adafactor(
            rate, weight_decay_rate=decay or None, weight_decay_mask=mask
        ),
    }[optim["optimizer"]]()
    return optax.chain(optax.clip_by_global_norm(optim["clip"]), update)


def updates_made(opt_state: Any) -> Int[Array, ""]:
    """The number of updates that an optimizer of `make_optimizer` has made.

    It is less than the step if steps were skipped.
    """
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def kernels(params: Any) -> Any:
    """A tree of booleans: True for kernels of convolutions and dense layers.

    The other parameters are the norms' scales, biases and learned embeddings.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
