"""The two U-Nets as a whole: parameter counts, names, conditioning, padding, remat."""

import collections

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.models.blocks import concat_lowres
from imagen_jax.models.efficient_unet import EfficientUNet
from imagen_jax.models.layers import TEXT
from imagen_jax.models.unet import UNet
from tests import tiny
from tests.models import reference

BASE = dict(
    channels=16,
    multipliers=(1, 2),
    blocks=1,
    attention=(False, True),
    text_attention=(False, True),
    head_channels=16,
    cond_dim=16,
    pooling="attention",
    pool_heads=2,
    res_block="biggan",
    scale_shift=True,
    patch=1,
    lowres=False,
    dropout=0.0,
)
EFFICIENT = dict(
    widths=(16, 32),
    blocks=(1, 2),
    attention=("none", "fused"),
    heads=2,
    cond_dim=16,
    pooling="attention",
    pool_heads=2,
    residual_scale=2**-0.5,
    scale_shift=True,
    lowres=True,
    dropout=0.0,
)

# One level, for what does not depend on the number of levels.
ONE_LEVEL = {
    UNet: BASE | dict(multipliers=(1,), attention=(True,), text_attention=(True,)),
    EfficientUNet: EFFICIENT | dict(widths=(16,), blocks=(1,), attention=("fused",)),
}


def inputs(size=8, lowres=0, length=5, dim=8, b=2):
    key = lambda i: jax.random.key(i)
    cond = {
        "text": jax.random.normal(key(1), (b, length, dim)),
        "text_mask": jnp.arange(length)[None] < jnp.array([2, length])[:b, None],
    }
    if lowres:
        cond |= {
            "lowres": jax.random.normal(key(2), (b, lowres, lowres, 3)),
            "lowres_logsnr": jnp.array([1.0, 3.0])[:b],
        }
    return jax.random.normal(key(3), (b, size, size, 3)), jnp.array([0.5, -2.0])[:b], cond


def perturbed(model, args):
    """Parameters away from initialisation, where the output is zero for every input."""
    return tiny.random_params(model.init, *args)["params"]


@pytest.fixture(scope="module", params=["unet", "efficient_unet"])
def network(request):
    """(jitted apply(params, z, logsnr, cond), params, inputs) of small SR networks."""
    model = (
        UNet(**(BASE | {"lowres": True})) if request.param == "unet" else EfficientUNet(**EFFICIENT)
    )
    args = inputs(lowres=4)
    return jax.jit(lambda p, *a: model.apply({"params": p}, *a)), perturbed(model, args), args


def test_network_is_its_formulas(network):
    """Catches blocks connected in another way: another order of skips, a level without its
    attention, or up-sampling at another position.
    """
    apply, params, (z, logsnr, cond) = network
    p, cond64 = (
        jax.tree.map(np.float64, params),
        {
            name: np.asarray(value) if name == "text_mask" else np.float64(value)
            for name, value in cond.items()
        },
    )
    x, more = (
        np.float64(concat_lowres(z, cond["lowres"])),
        dict(kinds=(None, "fused"), pool_heads=2, groups=lambda c: min(32, c // 4)),
    )
    if "out_norm" in params:
        want = reference.unet(p, x, np.float64(logsnr), cond64, blocks=1, head_channels=16, **more)
    else:
        want = reference.efficient_unet(
            p, x, np.float64(logsnr), cond64, blocks=(1, 2), heads=2, residual_scale=2**-0.5, **more
        )
    np.testing.assert_allclose(apply(params, z, logsnr, cond), want, atol=1e-4 * np.abs(want).max())


def parameters(model, size, lowres=0, dim=0):
    z, logsnr, cond = jnp.zeros((1, size, size, 3)), jnp.zeros(1), {}
    if dim:
        cond |= {"text": jnp.zeros((1, 4, dim)), "text_mask": jnp.ones((1, 4), bool)}
    if lowres:
        cond |= {"lowres": jnp.zeros((1, lowres, lowres, 3)), "lowres_logsnr": jnp.zeros(1)}
    return jax.eval_shape(model.init, jax.random.key(0), z, logsnr, cond)["params"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "width, wanted",
    [
        pytest.param(192, 295_131_267, marks=pytest.mark.slow),
        pytest.param(256, 524_563_971, marks=pytest.mark.slow),
        pytest.param(320, 819_524_483, marks=pytest.mark.slow),
        pytest.param(384, 1_180_012_803, marks=pytest.mark.slow),
        (512, 2_097_572_867),
    ],
)
def test_base_parameter_counts(width, wanted):
    """Catches a missing or additional layer in the base U-Net (without text)."""
    model = UNet(
        channels=width,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        attention=(False, True, True, True),
        text_attention=(False,) * 4,
        head_channels=64,
        cond_dim=0,
        pooling="attention",
        pool_heads=8,
        res_block="biggan",
        scale_shift=True,
        patch=1,
        lowres=False,
        dropout=0.0,
    )
    assert count(parameters(model, 64)) == wanted


def test_efficient_parameter_count():
    """Catches a fifth level, concatenated skips and a missing 1x1 shortcut, in the trunk of F.2
    without text.
    """
    model = EfficientUNet(
        widths=(128, 256, 512, 1024),
        blocks=(2, 4, 8, 8),
        attention=("none",) * 4,
        heads=8,
        cond_dim=0,
        pooling="attention",
        pool_heads=8,
        residual_scale=2**-0.5,
        scale_shift=True,
        lowres=True,
        dropout=0.0,
    )
    assert count(parameters(model, 256, 64)) == 451_046_019


def test_names():
    """Catches renamed levels: sharding rules, checkpoints and profiles use these names."""
    tree = parameters(UNet(**(BASE | {"blocks": 2})), 8, dim=8)
    assert sorted(tree) == [
        "conditioning",
        "down_0",
        "down_1",
        "mid",
        "out",
        "out_norm",
        "stem",
        "up_0",
        "up_1",
    ]
    assert sorted(tree["down_1"]) == ["attn_0", "attn_1", "block_0", "block_1"]
    assert sorted(tree["up_1"]) == [
        "attn_0",
        "attn_1",
        "attn_2",
        "block_0",
        "block_1",
        "block_2",
        "resample",
    ]
    assert sorted(tree["mid"]) == ["attn_0", "block_0", "block_1"]
    tree = parameters(EfficientUNet(**EFFICIENT), 8, 4, 8)
    assert sorted(tree["up_1"]) == ["attn", "block_0", "block_1", "mlp", "upsample"]


def test_output_starts_at_zero():
    """Catches an output layer that is not zero-initialised."""
    model, args = EfficientUNet(**ONE_LEVEL[EfficientUNet]), inputs(lowres=4)
    out = jax.jit(lambda *a: model.apply(model.init(jax.random.key(0), *a), *a))(*args)
    assert out.shape == (2, 8, 8, 3) and out.dtype == jnp.float32 and not out.any()


@pytest.mark.parametrize("name", ["text", "lowres", "lowres_logsnr"])
def test_conditioning_arrives(network, name):
    """Catches conditioning that is read under another key or not at all, and samples that affect
    each other.
    """
    apply, params, (z, logsnr, cond) = network
    before = apply(params, z, logsnr, cond)
    # Random changes, because a LayerNorm would undo a constant.
    changed = cond[name][0] + jax.random.normal(jax.random.key(9), cond[name][0].shape)
    after = apply(params, z, logsnr, cond | {name: cond[name].at[0].set(changed)})
    assert np.abs(after[0] - before[0]).max() > 1e-3
    np.testing.assert_array_equal(after[1], before[1])


def test_noise_level_arrives(network):
    """Catches a network that does not use the log-SNR."""
    apply, params, (z, logsnr, cond) = network
    assert np.abs(apply(params, z, logsnr + 1, cond) - apply(params, z, logsnr, cond)).max() > 1e-3


@pytest.mark.parametrize("family", [pytest.param(UNet, marks=pytest.mark.slow), EfficientUNet])
def test_text_values_replace_the_text(family):
    """Catches a part of the network that reads the text although its values are given, values that
    depend on z, and values of another layer.
    """
    model = family(**(EFFICIENT if family is EfficientUNet else BASE | {"lowres": True}))
    z, logsnr, cond = inputs(lowres=4)
    params = tiny.random_params(model.init, z, logsnr, cond)["params"]
    run = jax.jit(
        lambda given, *args: model.apply({"params": params, **given}, *args, mutable=[TEXT])
    )
    expected, values = run({}, z, logsnr, cond)
    jax.tree.map(np.testing.assert_array_equal, values, run({}, 2 * z + 1, logsnr + 1, cond)[1])
    blank = cond | {"text": jnp.full_like(cond["text"], 7.0)}
    output, _ = run(values, z, logsnr, blank)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(run({}, z, logsnr, blank)[0] - expected).max() > 1e-2


def test_padding_does_not_change_the_output(network):
    """Catches attention, pooling or norms that include padding: padding is filled with large
    numbers, and then more padding is appended.
    """
    apply, params, (z, logsnr, cond) = network
    before = apply(params, z, logsnr, cond)
    filled = jnp.where(cond["text_mask"][..., None], cond["text"], 100.0)
    np.testing.assert_array_equal(apply(params, z, logsnr, cond | {"text": filled}), before)
    longer = {
        "text": jnp.pad(cond["text"], ((0, 0), (0, 3), (0, 0))),
        "text_mask": jnp.pad(cond["text_mask"], ((0, 0), (0, 3))),
    }
    np.testing.assert_allclose(apply(params, z, logsnr, cond | longer), before, atol=1e-5)


@pytest.mark.parametrize("family", [EfficientUNet, pytest.param(UNet, marks=pytest.mark.slow)])
def test_remat_recomputes_and_changes_nothing(family):
    """Catches a remat setting that has no effect, by comparing the traced programs, and one that
    changes the gradients.
    """
    args = inputs(lowres=0 if family is UNet else 4)
    params = perturbed(family(**ONE_LEVEL[family]), args)
    rematted, grads = {}, {}
    for kind in ("none", "matrix", "block"):
        model = family(**ONE_LEVEL[family], remat=kind)
        loss = lambda p, model=model: jnp.sum(jnp.square(model.apply({"params": p}, *args)))
        traced = jax.jit(jax.grad(loss)).trace(params)
        rematted[kind] = str(traced.jaxpr).count("remat")
        grads[kind] = jax.device_get(traced.lower().compile()(params))
    assert rematted["none"] == 0 and min(rematted["matrix"], rematted["block"]) >= 2
    close = lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-3, atol=1e-3 * float(np.abs(a).max() + 1e-6)
    )
    for kind in ("matrix", "block"):
        jax.tree.map(close, grads["none"], grads[kind])


def primitives(jaxpr):
    """The names of all operations of a traced program; subprograms count once per call."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inside in jax.extend.core.jaxprs_in_params(equation.params):
            yield from primitives(inside)


def test_remat_keeps_what_it_says():
    """Catches a policy that stores everything or nothing: convolutions are recomputed by "block"
    only, activations by both.
    """
    counts = {}
    for kind in ("none", "matrix", "block"):
        model, args = UNet(**ONE_LEVEL[UNet], remat=kind), inputs()
        shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
        loss = lambda p, model=model, args=args: jnp.sum(model.apply(p, *args) ** 2)
        traced = jax.make_jaxpr(jax.grad(loss))(shapes).jaxpr
        counts[kind] = collections.Counter(primitives(traced))
    assert (
        counts["none"]["conv_general_dilated"]
        == counts["matrix"]["conv_general_dilated"]
        < counts["block"]["conv_general_dilated"]
    )
    assert counts["none"]["logistic"] < counts["matrix"]["logistic"] <= counts["block"]["logistic"]


def test_bf16_computes_near_fp32():
    """Catches an ignored dtype (equal results), and missing fp32 islands (a large error)."""
    args = inputs(lowres=4)
    fp32, bf16 = EfficientUNet(**EFFICIENT), EfficientUNet(**EFFICIENT, dtype=jnp.bfloat16)
    params = perturbed(fp32, args)
    a, b = (jax.jit(lambda p, m=m: m.apply({"params": p}, *args))(params) for m in (fp32, bf16))
    assert a.dtype == b.dtype == jnp.float32
    error = np.abs(a - b).max() / np.abs(a).max()
    assert 1e-5 < error < 0.05


def test_patch_and_plain_blocks_keep_the_size():
    """Catches patches that are not unfolded, and plain resampling that halves the size on one path
    only.
    """
    args = inputs(size=8)
    for options in (
        {"patch": 2},
        {"res_block": "plain"},
        {"scale_shift": False},
        {"pooling": "mean"},
    ):
        model = UNet(**(BASE | options))
        assert jax.eval_shape(
            lambda p: model.apply(p, *args), jax.eval_shape(model.init, jax.random.key(0), *args)
        ).shape == (2, 8, 8, 3)


def test_non_square_and_larger_images():
    """Catches a fixed image size in the SR network: it trains on crops, samples full images."""
    model = EfficientUNet(**(EFFICIENT | {"attention": ("none", "cross")}))
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs(8, 4))
    z, cond = jnp.zeros((2, 16, 24, 3)), inputs(8, 4)[2] | {"lowres": jnp.zeros((2, 8, 12, 3))}
    assert jax.eval_shape(model.apply, params, z, jnp.zeros(2), cond).shape == z.shape


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attention": (True,)}, "one entry per level"),
        ({"cond_dim": 0}, "needs text"),
        ({"res_block": "x"}, "'x'"),
        ({"pooling": "max"}, "'max'"),
        ({"remat": "all"}, "'all'"),
    ],
)
def test_wrong_fields_are_named(options, message):
    """Catches settings that are accepted and ignored."""
    with pytest.raises((ValueError, KeyError), match=message):
        jax.eval_shape(UNet(**(BASE | options)).init, jax.random.key(0), *inputs())


@pytest.mark.parametrize("height, width", [(12, 8), (8, 12)])
@pytest.mark.parametrize(
    "model",
    [
        EfficientUNet(
            **(
                EFFICIENT
                | dict(widths=(8, 8, 8), blocks=(1, 1, 1), attention=("none",) * 3, heads=1)
            )
        ),
        UNet(
            **(
                BASE
                | dict(
                    multipliers=(1, 1, 1),
                    attention=(False,) * 3,
                    text_attention=(False,) * 3,
                    patch=2,
                    lowres=True,
                )
            )
        ),
    ],
    ids=["efficient_unet", "unet"],
)
def test_indivisible_size_is_named(model, height, width):
    """Catches a reshape error inside the network in place of the sizes that are valid."""
    _, logsnr, cond = inputs(8, 4)
    with pytest.raises(ValueError, match="divisible by 8"):
        jax.eval_shape(
            model.init, jax.random.key(0), jnp.zeros((2, height, width, 3)), logsnr, cond
        )
