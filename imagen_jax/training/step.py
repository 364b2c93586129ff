"""The train step of a stage: a pure function whose PRNG key is fold_in(seed, step)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from imagen_jax import sharding
from imagen_jax.stage import PINNED, Batch, Params, Stage, create_stage, random_key
from imagen_jax.stage_sizes import Size
from imagen_jax.training import bad_steps, ema
from imagen_jax.training.bad_steps import Rules
from imagen_jax.training.objective import QUARTILES, Objective
from imagen_jax.training.optim import learning_rate, make_optimizer, updates_made
from imagen_jax.training.state import TrainState, abstract_state

Metrics = dict[str, Shaped[Array, "..."]]
STOP = Rules()


def check_accumulation(batch_size: int, parts: int) -> None:
    """Raises ValueError if the batch is not divisible into this number of micro-batches."""
    if parts < 1 or batch_size % parts:
        raise ValueError(
            f"data.batch_size={batch_size} does not divide into optim.accumulation={parts} parts;"
            " use a divisor of the batch size"
        )


def split_batch(tree: Any, parts: int) -> Any:
    """[b, ...] -> [parts, b / parts, ...].

    Part i has rows i, i + parts, ..., so that rows of a device stay on it.
    """

    def split(a):
        check_accumulation(a.shape[0], parts)
        return jnp.swapaxes(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def loss_and_grad(
    objective: Objective, params: Params, batch: Batch, key: Key[Array, ""], accumulation: int
) -> tuple[Float[Array, ""], Params, Float[Array, "2 4"]]:
    """The mean loss, its gradient in fp32, and `by_quartile` of the losses.

    Random numbers are drawn for the whole batch, so `accumulation` changes memory, not the result.
    With dropout, each micro-batch has its own masks.
    """
    b = batch["image"].shape[0]
    draw_key, dropout_key = jax.random.split(key)
    draws = objective.draw(draw_key, b, batch["image"].shape[1:3])

    def part_loss(params, part, i):
        batch, draws = part
        losses = objective.per_sample_loss(params, batch, draws, jax.random.fold_in(dropout_key, i))
        return jnp.sum(losses) / b, losses

    value_and_grad = jax.value_and_grad(part_loss, has_aux=True)
    quartiles = objective.noise_quartile(draws)
    if accumulation == 1:
        (loss, losses), grads = value_and_grad(params, (batch, draws), 0)
        return loss, grads, by_quartile(losses, quartiles)
    parts = split_batch((dict(batch), draws), accumulation)

    def add_part(total, i_part):
        i, part = i_part
        (loss, losses), grads = value_and_grad(params, part, i)
        return jax.tree.map(jnp.add, total, (loss, grads)), losses

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (loss, grads), losses = jax.lax.scan(add_part, zero, (jnp.arange(accumulation), parts))
    return loss, grads, by_quartile(losses, split_batch(quartiles, accumulation))


def by_quartile(losses: Float[Array, "*b"], quartiles: Int[Array, "*b"]) -> Float[Array, "2 4"]:
    """The sum of the losses, and their number, of each quartile of the training noise.

    quartiles: of each row, see `Objective.noise_quartile`.
    """
    inside = jax.nn.one_hot(quartiles, QUARTILES, dtype=jnp.bool_)
    rows = tuple(range(losses.ndim))
    sums = jnp.sum(jnp.where(inside, losses[..., None], 0.0), axis=rows)
    return jnp.stack([sums, jnp.sum(inside, axis=rows, dtype=jnp.float32)])


def make_update(
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    optim: Mapping[str, Any],
    rules: Rules = STOP,
) -> Callable[[TrainState, Float[Array, ""], Params], tuple[TrainState, Metrics]]:
    """(state, loss, gradients) -> (state, metrics): the part of a step without the network.

    If the loss, the gradient or the updated parameters are not finite, the device skips this and
    all later updates, and `bad_step` is the first such step. With `rules.skip_bad` it skips only
    this one. A skipped update changes the counter of steps and the window of norms alone: the
    counters of the optimizer and of the EMA do not count it.

    rate: learning rate of the optimizer, for the metrics.
    """

    tracks = ema.tracks(optim)

    def update(
        state: TrainState, loss: Float[Array, ""], grads: Params
    ) -> tuple[TrainState, Metrics]:
        grad_norm, number = optax.tree.norm(grads), updates_made(state.opt_state)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params_norm = optax.tree.norm(params)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(params_norm)
        metrics = {
            "loss": loss,
            "optim/lr": rate(number),
            "norm/grad": grad_norm,
            "norm/update": optax.tree.norm(updates),
            "norm/params": params_norm,
        }
        bad_step, applied, window, verdict = decide(rules, state, grad_norm, finite)
        averages = (state.ema, *state.ema_tracks)
        followed = (
            ema.follow(*pair, params, number) for pair in zip(tracks, averages, strict=True)
        )
        select = lambda new, old: jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)
        first, *more = (select(new, old) for new, old in zip(followed, averages))
        selected = select(params, state.params), first, select(opt_state, state.opt_state)
        new_state = TrainState(state.step + 1, *selected, bad_step, tuple(more), window)
        return new_state, metrics | verdict

    return update


def decide(
    rules: Rules, state: TrainState, norm: Float[Array, ""], finite: Bool[Array, ""]
) -> tuple[Int[Array, ""], Bool[Array, ""], Any, Metrics]:
    """(bad_step, whether the update is applied, the window of norms, metrics) of a step.

    norm: of the gradient. finite: whether loss, gradient and updated parameters are. The metrics
    are `bad_step`; `skipped`, if the rules can skip; `spike` and `norm/grad_median`, with a window.
    """
    bad_step, window, verdict = state.bad_step, state.grad_norms, {}
    if not rules.skip_bad:
        bad_step = jnp.where((bad_step < 0) & ~finite, state.step, bad_step)
    applied = bad_step < 0
    if rules.skip_bad:
        applied &= finite
    if rules.has_window:
        median = bad_steps.median(window)
        spike = rules.is_spike(norm, median, finite)
        window = bad_steps.push(window, norm)
        verdict = {"spike": spike, "norm/grad_median": median}
        if rules.skip_spikes:
            applied &= ~spike
    if rules.may_skip:
        verdict["skipped"] = ~applied
    return bad_step, applied, window, {"bad_step": bad_step} | verdict


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    optim: Mapping[str, Any],
    seed: int,
    rules: Rules = STOP,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics); jit it with the state donated (see `make_update`).

    The metric `loss_by_quartile` is `by_quartile` of the losses; all others are scalars.
    """
    update = make_update(optimizer, rate, optim, rules)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with PINNED():
            key = jax.random.fold_in(random_key(seed), state.step)
            loss, grads, quartiles = loss_and_grad(
                objective, state.params, batch, key, optim["accumulation"]
            )
        state, metrics = update(state, loss, grads)
        return state, metrics | {"loss_by_quartile": quartiles}

    return step


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """The train step of a config on a mesh, before compilation; train runs it, plan compiles it.

    stage, mesh, optimizer: the objects that the step was built from.
    step: the jitted step.
    abstract: the state as shapes with shardings.
    shardings: shardings of the state.
    batches: for each bucket the batch as shapes with shardings.
    accumulation: number of micro-batches per batch (gradient accumulation).
    """

    stage: Stage
    mesh: Mesh
    optimizer: optax.GradientTransformation
    step: Any
    abstract: TrainState
    shardings: TrainState
    batches: Mapping[Size, Mapping[str, jax.ShapeDtypeStruct]]
    accumulation: int

    @classmethod
    def create(cls, config: Mapping[str, Any], mesh: Mesh) -> "TrainProgram":
        """Builds the train step; allocates and compiles nothing.

        Raises ValueError for a batch that is not divisible over the devices or micro-batches, and
        for an invalid model or sharding rules.
        """
        rows = config["data"]["batch_size"]
        check_accumulation(rows, config["optim"]["accumulation"])
        sharding.check_batch(rows, mesh.shape)
        stage = create_stage(config, mesh)
        optimizer = make_optimizer(config["optim"], config["train"]["steps"])
        rules, min_elements = (config["mesh"][name] for name in ("rules", "fsdp_min_elements"))
        bad, tracks = Rules.of(config["train"]), len(config["optim"]["ema_tracks"])
        abstract, shardings = abstract_state(
            stage, optimizer, mesh, rules, min_elements, tracks, bad.has_window
        )
        over_rows = sharding.batch_sharding(mesh)
        step = make_step(
            stage,
            optimizer,
            learning_rate(config["optim"], config["train"]["steps"]),
            config["optim"],
            config["seed"],
            bad,
        )
        jitted = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, over_rows),
            out_shardings=(shardings, sharding.replicated(mesh)),
            compiler_options=sharding.compiler_options(mesh),
        )
        batches = {
            bucket: {
                name: jax.ShapeDtypeStruct(*shape, sharding=over_rows)
                for name, shape in stage.batch_shapes(rows, bucket).items()
            }
            for bucket in stage.buckets
        }
        return cls(
            stage,
            mesh,
            optimizer,
            jitted,
            abstract,
            shardings,
            batches,
            config["optim"]["accumulation"],
        )

    @property
    def batch(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """The batch of the largest bucket, as shapes with shardings."""
        return self.batches[self.stage.largest_bucket]

    def lower(self, bucket: Size | None = None) -> Any:
        """The step traced and lowered for its mesh; its `.compile()` takes minutes.

        bucket: the size of the images; None for the largest bucket.
        """
        return self.step.lower(self.abstract, self.batches[bucket] if bucket else self.batch)


def forward_flops(stage: Stage, size: Size) -> float:
    """FLOPs of the loss of one sample, forward only, as XLA counts them in the traced program.

    A training step costs three times that. Give a `stage` without a mesh: XLA does not count inside
    TPU kernels. The CPU backend counts, because the plugins of GPUs and TPUs cannot before they
    compile; `cli.set_up_jax` keeps the CPU available.

    size: of the images.
    """
    shapes = stage.batch_shapes(1, size)
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    params = jax.eval_shape(stage.init, jax.random.key(0))
    loss = lambda params, batch, key: stage.per_sample_loss(params, batch, stage.draw(key, 1, size))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return float(jax.jit(loss).lower(params, batch, jax.random.key(0)).cost_analysis()["flops"])
