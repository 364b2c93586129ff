"""The training state, and how it is born: shapes first, then shardings by rule, then values, each
shard on its own device.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from imagen_jax.sharding import path_name, tree_shardings
from imagen_jax.stage import random_key
from imagen_jax.training.objective import Objective


@flax.struct.dataclass
class TrainState:
    """All a run carries from step to step. Neither PRNG nor data position: both are functions of
    (seed, step).

    The leaves are arrays, or in a state's description their shapes or shardings.
    """

    step: Any  # int32 []: updates done
    params: Any
    ema: Any  # the average that is sampled
    opt_state: Any
    bad_step: Any  # int32 []: the first step whose loss or gradient was not finite, or -1; sticky
    ema_tracks: Any = ()  # further averages, in the order of optim.ema_tracks


def initial_state(
    objective: Objective, optimizer: optax.GradientTransformation, seed: int, tracks: int = 0
) -> TrainState:
    """State before the first step, every EMA equal to the parameters. To be traced.

    tracks: the number of EMAs beside the first.
    """
    params = objective.init(random_key(seed))
    # Copies, not aliases: the step donates the whole state, and a buffer cannot be donated twice.
    ema, *more = (jax.tree.map(jnp.copy, params) for _ in range(1 + tracks))
    none = jnp.full((), -1, jnp.int32)
    return TrainState(
        jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), none, tuple(more)
    )


def abstract_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: Any,
    min_elements: int,
    tracks: int = 0,
) -> tuple[TrainState, TrainState]:
    """(shapes with shardings, shardings) of the state; nothing is allocated."""
    shapes = jax.eval_shape(lambda: initial_state(objective, optimizer, 0, tracks))
    shardings = tree_shardings(shapes, mesh, rules, min_elements)
    with_shardings = jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings
    )
    return with_shardings, shardings


def create_state(
    objective: Objective, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState
) -> TrainState:
    """A fresh state, every leaf computed where it lives."""
    fresh = lambda: initial_state(objective, optimizer, seed, len(shardings.ema_tracks))
    return jax.jit(fresh, out_shardings=shardings)()


def with_params(state: TrainState, params: Any, shardings: TrainState) -> TrainState:
    """`state` with other parameters, and every EMA starting there. Raises ValueError naming the
    first leaf that is missing, left over or misshapen.
    """
    wanted = {
        path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    found = {
        path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    wrong = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} weights do not fit the model, {name} first: {found.get(name, 'missing')}"
            f" where {wanted.get(name, 'none')} is wanted"
        )
    place = lambda tree: jax.device_put(
        jax.tree.map(lambda p, old: p.astype(old.dtype), params, state.params), tree
    )
    more = tuple(map(place, shardings.ema_tracks))
    return state.replace(params=place(shardings.params), ema=place(shardings.ema), ema_tracks=more)
