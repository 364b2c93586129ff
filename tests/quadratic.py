"""An objective that compiles in milliseconds, for tests of the training step and its state."""

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.training import optim
from imagen_jax.training.bad_steps import Rules
from imagen_jax.training.step import make_step
from tests import tiny

D = 5


class Quadratic:
    """Half the squared distance of the kernel [D] from the row's image [D] plus noise."""

    def init(self, key):
        return {"stem": {"kernel": jax.random.normal(key, (D,))}}

    def draw(self, key, b, size):
        return {"eps": jax.random.normal(key, (b, D))}

    def noise_quartile(self, draws):
        return jnp.arange(len(draws["eps"])) % 4

    def per_sample_loss(self, params, batch, draws, dropout_key=None):
        away = params["stem"]["kernel"][None] - batch["image"] - draws["eps"]
        return (away**2).sum(axis=-1) / 2


def objective_and_step(**changes):
    """(config, objective, optimizer, jitted step) of the changed fields of `tiny.config`."""
    config, objective = tiny.config(optim__warmup=0, **changes), Quadratic()
    schedule = config["optim"], config["train"]["steps"]
    optimizer, rate = optim.make_optimizer(*schedule), optim.learning_rate(*schedule)
    rules = Rules.of(config["train"])
    step = make_step(objective, optimizer, rate, config["optim"], config["seed"], rules)
    return config, objective, optimizer, jax.jit(step)


def batch(b: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Images [b, D]."""
    return {"image": np.random.default_rng(seed).standard_normal((b, D)).astype(jnp.float32)}
