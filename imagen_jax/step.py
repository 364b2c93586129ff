"""The train step of a stage. Pure; its randomness is fold_in(seed, step)."""

from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from imagen_jax.optim import ema_decay
from imagen_jax.stage import Batch, Params, Stage
from imagen_jax.state import TrainState

Metrics = dict[str, Array]


def check_accumulation(batch_size: int, parts: int) -> None:
    """Raises ValueError unless a batch can be computed in this many parts."""
    if parts < 1 or batch_size % parts:
        raise ValueError(f"data.batch_size={batch_size} does not divide into optim.accumulation={parts} parts")


def split_batch(tree: Any, parts: int) -> Any:
    """[b, ...] -> [parts, b / parts, ...]; part i has rows i, i + parts, ..., so that rows of one device stay on it."""

    def split(a):
        check_accumulation(a.shape[0], parts)
        return jnp.swapaxes(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def loss_and_grad(stage: Stage, params: Params, batch: Batch, key: Key[Array, ""], accumulation: int) -> tuple[Array, Params]:
    """Mean loss and its gradient in fp32. Draws are made for the whole batch, so `accumulation` changes memory and not the result.

    (With dropout the parts have masks of their own.)
    """
    b = batch["image"].shape[0]
    draw_key, dropout_key = jax.random.split(key)
    draws = stage.draw(draw_key, b)

    def part_loss(params, part, i):
        batch, draws = part
        return jnp.sum(stage.per_sample_loss(params, batch, draws, jax.random.fold_in(dropout_key, i))) / b

    if accumulation == 1:
        return jax.value_and_grad(part_loss)(params, (batch, draws), 0)
    parts = split_batch((dict(batch), draws), accumulation)

    def add_part(total, i_part):
        i, part = i_part
        return jax.tree.map(jnp.add, total, jax.value_and_grad(part_loss)(params, part, i)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add_part, zero, (jnp.arange(accumulation), parts))[0]


def make_step(
    stage: Stage, optimizer: optax.GradientTransformation, rate: optax.Schedule, optim: Mapping[str, Any], seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics), to be jitted with the state donated.

    `rate` is the optimizer's learning rate, for the record. If loss, gradient, or the parameters after the update are not finite, the
    update is skipped on the device, and so is every later one: `bad_step` names the first.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads = loss_and_grad(stage, state.params, batch, key, optim["accumulation"])
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params_norm = optax.tree.norm(params)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(params_norm)
        bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
        decay = ema_decay(state.step, optim["ema"])
        ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(bad_step < 0, n, o), new, old)
        metrics = {
            "loss": loss,
            "optim/lr": rate(state.step),
            "norm/grad": grad_norm,
            "norm/update": optax.tree.norm(updates),
            "norm/params": params_norm,
            "bad_step": bad_step,
        }
        new = TrainState(state.step + 1, keep(params, state.params), keep(ema, state.ema), keep(opt_state, state.opt_state), bad_step)
        return new, metrics

    return step


def forward_flops(stage: Stage) -> float:
    """FLOPs of the loss of one sample, forward only, as the compiler counts the traced program. A training step costs three times that."""
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in stage.batch_shapes(1).items()}
    params = jax.eval_shape(stage.init, jax.random.key(0))
    loss = lambda params, batch, key: stage.per_sample_loss(params, batch, stage.draw(key, 1))
    return float(jax.jit(loss).lower(params, batch, jax.random.key(0)).cost_analysis()["flops"])
