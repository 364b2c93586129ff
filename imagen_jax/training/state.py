"""The training state and its creation: shapes, then shardings by rule, then values.

Each shard is computed on its own device.
"""

import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from imagen_jax.sharding import path_name, replicated, tree_shardings
from imagen_jax.stage import random_key
from imagen_jax.training import bad_steps
from imagen_jax.training.objective import Objective
from imagen_jax.weights.checkpoint import Checkpoints
from imagen_jax.weights.fast_checkpoints import FastCheckpoints
from imagen_jax.weights.leaves import check_fit


@flax.struct.dataclass
class TrainState:
    """All arrays that a run carries from step to step.

    It holds neither a PRNG key nor a data position: both are functions of (seed, step). The leaves
    are arrays, or their shapes or shardings in a description of a state.
    """

    step: Any  # int32 []: number of updates
    params: Any
    ema: Any  # the average used for sampling
    opt_state: Any
    bad_step: Any  # int32 []: the first step whose loss or gradient was not finite, or -1; sticky
    ema_tracks: Any = ()  # further averages, in the order of optim.ema_tracks
    grad_norms: Any = ()  # fp32 [WINDOW]: the last gradient norms; () without train.spike_factor


def initial_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    seed: int,
    tracks: int = 0,
    window: bool = False,
) -> TrainState:
    """The state before the first step; every EMA equals the parameters. Call it under jit.

    tracks: number of EMAs in addition to the first. window: whether it has gradient norms.
    """
    params = objective.init(random_key(seed))
    # Copies, not aliases: the step donates the whole state, and a buffer cannot be donated twice.
    ema, *more = (jax.tree.map(jnp.copy, params) for _ in range(1 + tracks))
    none = jnp.full((), -1, jnp.int32)
    norms = bad_steps.empty_window() if window else ()
    return TrainState(
        jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), none, tuple(more), norms
    )


def abstract_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: Any,
    min_elements: int,
    tracks: int = 0,
    window: bool = False,
) -> tuple[TrainState, TrainState]:
    """(shapes with shardings, shardings) of the state. Allocates nothing."""
    shapes = jax.eval_shape(lambda: initial_state(objective, optimizer, 0, tracks, window))
    shardings = tree_shardings(shapes.replace(grad_norms=()), mesh, rules, min_elements)
    shardings = shardings.replace(grad_norms=replicated(mesh) if window else ())
    with_shardings = jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings
    )
    return with_shardings, shardings


def create_state(
    objective: Objective, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState
) -> TrainState:
    """The initial state; each device computes its own shards."""
    parts = len(shardings.ema_tracks), shardings.grad_norms != ()
    create = lambda: initial_state(objective, optimizer, seed, *parts)
    return jax.jit(create, out_shardings=shardings)()


def restore(
    checkpoints: Checkpoints | FastCheckpoints,
    step: int,
    abstract: TrainState,
    mesh: Mesh,
    window: bool,
) -> TrainState:
    """The state of a checkpoint as `abstract` describes it.

    If only the checkpoint has a window of gradient norms, it is dropped; if only `abstract` has
    one, it starts empty.

    window: whether the checkpoint has one. Raises what `Checkpoints.restore` raises.
    """
    everywhere = replicated(mesh)
    stored = jax.ShapeDtypeStruct((bad_steps.WINDOW,), jnp.float32, sharding=everywhere)
    state, _ = checkpoints.restore(step, abstract.replace(grad_norms=stored if window else ()))
    wanted = abstract.grad_norms != ()
    if wanted == window:
        return state
    fresh = jax.jit(bad_steps.empty_window, out_shardings=everywhere)() if wanted else ()
    return state.replace(grad_norms=fresh)


def with_params(state: TrainState, params: Any, shardings: TrainState) -> TrainState:
    """`state` with other parameters, which are also copied to every EMA.

    params: arrays of the host, or of `state` itself.

    Raises ValueError with the first leaf that is missing, unexpected or of another shape.
    """
    check_fit(params, state.params)

    def copied(p: Any, old: Any) -> Any:
        # The step donates the whole state, and a buffer cannot be donated twice.
        return jnp.copy(p) if isinstance(p, jax.Array) else p.astype(old.dtype)

    to_devices = lambda tree: jax.device_put(jax.tree.map(copied, params, state.params), tree)
    more = tuple(map(to_devices, shardings.ema_tracks))
    return state.replace(
        params=to_devices(shardings.params), ema=to_devices(shardings.ema), ema_tracks=more
    )


def bytes_table(tree: Any, shardings: Any) -> list[dict[str, Any]]:
    """The size of each top-level part of the state: a list of dicts.

    part               name of the part
    bytes              total
    bytes_per_device   bytes on one device
    sharded_bytes      bytes of the leaves that are sharded
    """
    rows: dict[str, dict[str, Any]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings)):
        size = leaf.dtype.itemsize
        total, local = (
            math.prod(leaf.shape) * size,
            math.prod(sharding.shard_shape(leaf.shape)) * size,
        )
        row = rows.setdefault(
            path_name(path).split("/")[0], {"bytes": 0, "bytes_per_device": 0, "sharded_bytes": 0}
        )
        row["bytes"] += total
        row["bytes_per_device"] += local
        row["sharded_bytes"] += total if local < total else 0
    return [{"part": part} | row for part, row in rows.items()]
