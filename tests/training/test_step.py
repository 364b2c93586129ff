"""The train step: accumulation, EMA, non-finite updates, determinism, the optimizer chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from imagen_jax import sharding
from imagen_jax.diffusion import loss
from imagen_jax.stage import create_stage
from imagen_jax.training import optim
from imagen_jax.training.state import initial_state
from imagen_jax.training.step import TrainProgram, forward_flops, loss_and_grad, split_batch
from tests import quadratic, tiny


@pytest.fixture(scope="module")
def simple():
    """(config, objective, jitted step, state) of a simple objective."""
    config, objective, optimizer, step = quadratic.objective_and_step()
    return config, objective, step, initial_state(objective, optimizer, 0)


def test_accumulation_equals_the_full_batch():
    """Catches draws made per part, a mean of sums, and a last part that overwrites the others."""
    stage, _, _ = tiny.stage_and_step(tiny.config("sr_256", **tiny.ONE_LEVEL_FIELDS))
    params, batch = tiny.random_params(stage.init), tiny.batch(stage, 8)
    results = [
        jax.jit(lambda p, b, n=n: loss_and_grad(stage, p, b, jax.random.key(5), n))(params, batch)
        for n in (1, 4)
    ]
    (loss, grads, quartiles), (split_loss, split_grads, split_quartiles) = results
    np.testing.assert_allclose(loss, split_loss, rtol=1e-6)
    np.testing.assert_allclose(quartiles, split_quartiles, rtol=1e-5)
    assert tiny.relative_error(split_grads, grads) < 1e-5
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 1e-3


def test_split_batch_keeps_every_row_once():
    """Catches a reshape that repeats or drops rows; and a batch that does not divide."""
    parts = split_batch(jnp.arange(12), 3)
    assert parts.shape == (3, 4) and sorted(parts.ravel().tolist()) == list(range(12))
    with pytest.raises(ValueError, match="accumulation=5"):
        split_batch(jnp.arange(12), 5)


def test_step_is_a_function_of_seed_and_step(simple):
    """Catches randomness from anywhere else: a resumed run must draw what the undisturbed one
    draws.
    """
    _, _, step, state = simple
    batch = quadratic.batch()
    _, first = step(state, batch)
    _, again = step(state, batch)
    _, later = step(state.replace(step=state.step + 1), batch)
    assert float(first["loss"]) == float(again["loss"]) != float(later["loss"])


def test_random_numbers_do_not_depend_on_the_sites_defaults():
    """Catches a generator, or its way of dividing numbers over devices, that a site's default
    changes on a resume without a word.
    """
    config = tiny.config("sr_256", **tiny.ONE_LEVEL_FIELDS)

    def first_loss():
        stage, optimizer, step = tiny.stage_and_step(config)
        state = jax.jit(lambda: initial_state(stage, optimizer, 0))()
        # The loss alone: the rest of the step, which has no random numbers, is not compiled.
        return float(jax.jit(lambda *args: step(*args)[1]["loss"])(state, tiny.batch(stage, 8)))

    expected = first_loss()
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        assert first_loss() == expected


def test_update_moves_parameters_and_ema(simple):
    """Catches an EMA of the old parameters, a decay that is swapped with its complement, and an
    update with the wrong sign.
    """
    config, objective, step, state = simple
    batch = quadratic.batch()
    new, metrics = step(state, batch)
    decay = min(config["optim"]["ema"], 1 / 10)
    expected = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, new.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.ema, expected)
    assert int(new.step) == 1 and float(metrics["optim/lr"]) == pytest.approx(config["optim"]["lr"])
    key = jax.random.fold_in(jax.random.key(config["seed"]), 0)
    draws = objective.draw(jax.random.split(key)[0], 8, (8, 8))
    loss = lambda params: objective.per_sample_loss(params, batch, draws).mean()
    np.testing.assert_allclose(loss(state.params), metrics["loss"], rtol=1e-5)
    assert loss(new.params) < loss(state.params)


def test_non_finite_update_is_skipped_for_good(simple):
    """Catches NaNs that reach parameters, EMA or optimizer, and a flag that a later finite step
    clears.
    """
    _, _, step, state = simple
    bad = quadratic.batch()
    bad["image"][0, 0] = np.nan
    broken, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"]) and int(broken.bad_step) == 0
    after, _ = step(broken, quadratic.batch())
    assert int(after.bad_step) == 0 and int(after.step) == 2
    for part in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(state, part))


def test_the_state_is_donated_and_the_batch_is_not():
    """Catches a step that holds the state twice: at paper size its memory is the largest part."""
    config = tiny.config("sr_256", **tiny.ONE_LEVEL_FIELDS)
    program = TrainProgram.create(config, sharding.make_mesh(tiny.config()["mesh"] | {"data": 8}))
    (state, batch), _ = program.lower().args_info
    assert all(leaf.donated for leaf in jax.tree.leaves(state))
    assert not any(leaf.donated for leaf in jax.tree.leaves(batch))


@pytest.mark.parametrize("field", ["text", "lowres"])
def test_loss_reads_what_the_batch_tells(field):
    """Catches a stage that trains on its own target in place of the low-res image or the caption it
    is given: the loss looks the better for it.
    """
    stage, _, _ = tiny.stage_and_step(tiny.config("sr_256", **tiny.ONE_LEVEL_FIELDS))
    batch, other = tiny.batch(stage, 2), tiny.batch(stage, 2, seed=1)
    params = tiny.random_params(stage.init)
    draws = stage.draw(jax.random.key(1), 2, (16, 16)) | {"drop": jnp.zeros(2, bool)}
    loss = jax.jit(lambda batch: stage.per_sample_loss(params, batch, draws))
    before, after = loss(batch), loss(batch | {field: np.stack([other[field][0], batch[field][1]])})
    assert abs(after[0] - before[0]) > 1e-5 * before[0] and after[1] == before[1]


def test_learning_rate():
    """Catches warm-up of the wrong length and a cosine that ends anywhere but at 0 on the last
    step.
    """
    settings = dict(lr=2.0, warmup=10, decay="constant")
    rate = optim.learning_rate(settings, 100)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(99)], [0, 1, 2, 2], atol=1e-6)
    rate = optim.learning_rate(settings | {"decay": "cosine"}, 110)
    np.testing.assert_allclose([rate(10), rate(60), rate(110)], [2, 1, 0], atol=1e-6)
    with pytest.raises(ValueError, match="train.steps=10 must exceed optim.warmup=10"):
        optim.learning_rate(settings | {"decay": "cosine"}, 10)


@pytest.mark.parametrize(
    "optimizer, name",
    [
        ("adam", "sr_256"),
        ("adafactor", "base_64"),
        pytest.param("adam", "base_64", marks=pytest.mark.slow),
        pytest.param("adafactor", "sr_256", marks=pytest.mark.slow),
    ],
)
def test_weight_decay_acts_on_kernels_only(optimizer, name):
    """Catches decay of norms' scales, biases or the learned query, and kernels without decay."""
    config = tiny.config(name, optim__optimizer=optimizer, optim__weight_decay=0.5, optim__warmup=0)
    stage, transformation, _ = tiny.stage_and_step(config)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda: transformation.update(zero, transformation.init(params), params))()
    moved = {"kernel": set(), "other": set()}
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        kind = "kernel" if path[-1].key == "kernel" else "other"
        moved[kind] |= set(np.asarray(update).ravel().tolist())
    decay = 0.5 * (config["optim"]["lr"] if optimizer == "adam" else 1.0)
    assert moved["other"] == {0.0} and list(moved["kernel"]) == [pytest.approx(-decay)]


def test_no_weight_decay_is_the_same_to_the_bit():
    """Catches a mask that changes the arithmetic or the state of runs without weight decay."""
    config = tiny.config(optim__warmup=0)["optim"]
    ours = optim.make_optimizer(config, 10)
    rate = optim.learning_rate(config, 10)
    plain = optax.adamw(rate, config["beta1"], config["beta2"], config["eps"], weight_decay=0.0)
    theirs = optax.chain(optax.clip_by_global_norm(config["clip"]), plain)
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8)), "bias": jnp.ones(8)}
    grads = jax.tree.map(jnp.cos, params)
    states = [one.init(params) for one in (ours, theirs)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    updates = [one.update(grads, s, params)[0] for one, s in zip((ours, theirs), states)]
    jax.tree.map(np.testing.assert_array_equal, *updates)


def test_adam_by_its_formula():
    """Catches beta1, beta2 or eps that are ignored, exchanged or fixed: two updates of Kingma & Ba
    2015, algorithm 1, in float64.
    """
    settings = tiny.config()["optim"] | dict(beta1=0.6, beta2=0.8, eps=0.05, clip=1e9, warmup=0)
    optimizer = optim.make_optimizer(settings, 10)
    params = {"bias": jnp.zeros(2)}
    state, m, v = optimizer.init(params), 0.0, 0.0
    for n, gradient in enumerate(([0.3, -2.0], [-0.1, 0.5]), start=1):
        g = np.array(gradient)
        m, v = 0.6 * m + 0.4 * g, 0.8 * v + 0.2 * g**2
        want = -settings["lr"] * m / (1 - 0.6**n) / (np.sqrt(v / (1 - 0.8**n)) + 0.05)
        update, state = optimizer.update({"bias": jnp.array(gradient)}, state, params)
        np.testing.assert_allclose(update["bias"], want, rtol=1e-4)


@pytest.mark.parametrize("name", ["cosine", "linear", "flow"])
def test_the_augmentation_follows_its_own_schedule(name):
    """Catches a stage that augments by the schedule of the sampler, or always by the cosine."""
    stage = create_stage(tiny.config("sr_256", diffusion__aug_schedule=name))
    batch = jax.device_put(tiny.batch(stage, 3))
    draws = stage.draw(jax.random.key(0), 3, (16, 16))
    x, cond = jnp.zeros((3, 16, 16, 3)), stage.cond(batch)
    _, noised = loss.noised(x, cond, draws, jnp.zeros(3), stage.process, stage.aug_schedule)
    t = np.asarray(draws["lowres_level"], np.float64)
    logsnr = {
        "cosine": -2 * np.log(np.tan(np.pi / 2 * t)),
        "linear": -np.log(np.expm1(0.1 * t + 9.95 * t**2)),
        "flow": 2 * np.log((1 - t) / t),
    }[name]
    np.testing.assert_allclose(noised["lowres_logsnr"], logsnr, atol=0.01)


def test_clipping_is_by_global_norm():
    """Catches clipping of each leaf alone: after it, Adam's first moments keep the leaves'
    proportion.
    """
    settings = tiny.config()["optim"] | {"warmup": 0, "clip": 1.0}
    optimizer = optim.make_optimizer(settings, 10)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    _, state = optimizer.update(
        {"a": jnp.array([30.0]), "b": jnp.array([40.0])}, optimizer.init(params), params
    )
    mu = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([mu["a"][0], mu["b"][0]], [0.06, 0.08], rtol=1e-5)


def test_adafactor_is_optax_default():
    """Catches an Adafactor that was tuned: the paper's listing calls optax.adafactor with its
    defaults.
    """
    settings = tiny.config()["optim"] | {"optimizer": "adafactor", "warmup": 0, "clip": 1e9}
    params = {"w": jnp.ones((130, 140))}
    grads = {"w": jax.random.normal(jax.random.key(0), (130, 140))}
    ours, theirs = optim.make_optimizer(settings, 10), optax.adafactor(settings["lr"])
    got, _ = ours.update(grads, ours.init(params), params)
    want, _ = theirs.update(grads, theirs.init(params), params)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)


def test_dropout_acts_in_training_only():
    """Catches dropout that never acts, or acts in sampling."""
    stage, _, _ = tiny.stage_and_step(tiny.config(**tiny.ONE_LEVEL_UNET, model__dropout=0.5))
    params = tiny.random_params(stage.init)
    batch = jax.device_put(tiny.batch(stage, 4))
    draws = stage.draw(jax.random.key(1), 4, (8, 8))
    losses = jax.jit(lambda key: stage.per_sample_loss(params, batch, draws, key))
    assert np.abs(losses(jax.random.key(2)) - losses(jax.random.key(3))).max() > 1e-4
    quiet = jax.jit(lambda: stage.per_sample_loss(params, batch, draws))()
    assert np.abs(quiet - losses(jax.random.key(2))).max() > 1e-4


def multiplications(jaxpr) -> int:
    """Multiply-adds of all convolutions and matrix products of a traced program, by their
    shapes.
    """
    total = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.invars if hasattr(v, "aval")]
        out = int(np.prod(equation.outvars[0].aval.shape)) if equation.outvars else 0
        if equation.primitive.name == "conv_general_dilated":
            total += out * int(np.prod(shapes[1][:-1]))  # kernel [height, width, in, out]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += out * int(np.prod([shapes[0][axis] for axis in contracted]))
        inside = [
            multiplications(getattr(inner, "jaxpr", inner))
            for inner in jaxprs_in_params(equation.params)
        ]
        # Of what is written in one way for each platform, a CPU runs the one that multiplies no
        # zeros between pixels.
        total += min(inside) if equation.primitive.name == "cond" else sum(inside)
    return total


@pytest.mark.parametrize("name", ["base_64", "sr_256"])
def test_forward_flops_by_shapes(name):
    """Catches FLOPs that are off by a factor: 2 a multiply-add of convolutions and matrix products,
    which are nearly all of a wide network's.
    """
    config = tiny.config(name)
    config["data"] |= {"image_size": 32, "lowres_size": 16 if config["data"]["lowres_size"] else 0}
    config["model"] |= {"channels": 64} if name == "base_64" else {"widths": (64, 64)}
    stage, _, _ = tiny.stage_and_step(config)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    size = stage.largest_bucket
    shapes = stage.batch_shapes(1, size)
    batch = {field: jax.ShapeDtypeStruct(*shape) for field, shape in shapes.items()}
    draw = lambda: stage.draw(jax.random.key(0), 1, size)
    traced = jax.make_jaxpr(lambda params, batch: stage.per_sample_loss(params, batch, draw()))(
        params, batch
    )
    assert (
        0.85 < forward_flops(stage, size) / (2 * multiplications(traced.jaxpr)) < 1.1
    )  # padding is not multiplied; norms and swishes are counted


def test_forward_flops_are_counted_by_the_cpu(monkeypatch):
    """Catches a count asked of the accelerator's plugin, which has none before it compiles: every
    training on a GPU or TPU ended there.
    """
    counted = jax.stages.Lowered.cost_analysis

    def as_a_plugin(lowered):
        device = jax.config.jax_default_device
        return counted(lowered) if device is not None and device.platform == "cpu" else None

    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", as_a_plugin)
    stage, _, _ = tiny.stage_and_step(tiny.config())
    assert forward_flops(stage, (8, 8)) > 0
