"""The blocks against the same formulas in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.models import layers, resampling
from imagen_jax.models.attention import Attention, FeedForward, TextPool, attend
from imagen_jax.models.blocks import ResBlock, concat_lowres
from imagen_jax.models.unet import Level
from tests.models import reference

F32 = jnp.float32
groups = lambda c: min(32, c // 4)


def randomized(module, seed, *args):
    """Parameters without zeros, so that every branch contributes, and their float64 copies."""
    params = module.init(jax.random.key(0), *args)["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    params = jax.tree.unflatten(
        tree, [np.float32(leaf + 0.2 * rng.standard_normal(leaf.shape)) for leaf in leaves]
    )
    return params, jax.tree.map(np.float64, params)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), F32)


def lengths(total, *valid):
    """Masks [b total] of captions with these lengths."""
    return jnp.arange(total)[None] < jnp.array(valid)[:, None]


def f64(a):
    return np.asarray(a, np.float64)


@pytest.mark.parametrize("resample", ["none", "down", "up"])
@pytest.mark.parametrize("scale_shift", [True, False])
def test_res_block(resample, scale_shift):
    """Catches a FiLM without the 1, swapped scale and shift, resampling of one branch only, a
    misplaced residual scale.
    """
    block = ResBlock(24, F32, scale_shift, resample=resample, residual_scale=0.6)
    h, emb = normal(1, 2, 4, 6, 16), normal(2, 2, 12)
    params, p64 = randomized(block, 3, h, emb, False)
    got = jax.jit(lambda p: block.apply({"params": p}, h, emb, False))(params)
    want = reference.res_block(p64, f64(h), f64(emb), resample, 0.6, scale_shift, groups)
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_res_block_shortcut_is_projected_where_asked():
    """Catches a projection always or never: the base model projects only where the width changes,
    the Efficient U-Net always.
    """
    h, emb = normal(1, 1, 2, 2, 16), normal(2, 1, 8)
    tree = lambda features, **kw: ResBlock(features, F32, True, **kw).init(
        jax.random.key(0), h, emb, False
    )["params"]
    assert (
        "shortcut" not in tree(16)
        and "shortcut" in tree(32)
        and "shortcut" in tree(16, project_shortcut=True)
    )


@pytest.mark.parametrize("options, scale", [({}, 1.0), ({"residual_scale": 0.5}, 0.5)])
def test_res_block_starts_as_its_shortcut(options, scale):
    """Catches a second convolution that is not zero at initialisation, and a base network that
    scales its residual sums.
    """
    block = ResBlock(16, F32, True, **options)
    h, emb = normal(1, 1, 2, 2, 16), normal(2, 1, 8)
    np.testing.assert_allclose(
        block.apply(block.init(jax.random.key(0), h, emb, False), h, emb, False),
        scale * h,
        rtol=1e-6,
    )


@pytest.mark.parametrize("kind", ["fused", "self", "cross"])
def test_attention(kind):
    """Catches a wrong softmax scale, unmasked padding, text normalised over tokens, heads split
    across the wrong axis.
    """
    layer = Attention(3, kind, F32)
    h, text = normal(1, 2, 2, 3, 24), normal(2, 2, 5, 10)
    mask = lengths(5, 2, 5)
    params, p64 = randomized(layer, 4, h, text, mask)
    got = jax.jit(lambda p: layer.apply({"params": p}, h, text, mask))(params)
    want = reference.attention(p64, f64(h), f64(text), np.asarray(mask), 3, kind, groups)
    np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize("kind", ["fused", "cross"])
def test_attention_ignores_padding(kind):
    """Catches additive masks that are too small, and norms over padding: padded features change by
    a lot.
    """
    layer = Attention(2, kind, F32)
    h, text = normal(1, 1, 2, 2, 16), normal(2, 1, 6, 8)
    mask = lengths(6, 3)
    params, _ = randomized(layer, 4, h, text, mask)
    apply = jax.jit(lambda text: layer.apply({"params": params}, h, text, mask))
    np.testing.assert_array_equal(
        apply(text), apply(jnp.where(mask[..., None], text, 50 * text + 7))
    )


def test_text_pool():
    """Catches a mean over padding in the query, and pooling over padding."""
    layer = TextPool("attention", 2, 6, F32)
    text = normal(1, 2, 5, 8)
    mask = lengths(5, 3, 1)
    params, p64 = randomized(layer, 5, text, mask)
    got = jax.jit(lambda p: layer.apply({"params": p}, text, mask))(params)
    np.testing.assert_allclose(
        got, reference.text_pool(p64, f64(text), np.asarray(mask), 2), atol=1e-4
    )


def test_learned_query_starts_small():
    """Catches a learned query that dominates the tokens' mean at initialisation or vanishes next to
    it: its length is 1 for every width.
    """
    params = TextPool("attention", 2, 6, F32).init(
        jax.random.key(0), jnp.zeros((1, 3, 400)), lengths(3, 3)
    )["params"]
    assert 0.9 < np.linalg.norm(params["query"]) < 1.1


@pytest.mark.parametrize("resample", ["down", "up"])
def test_plain_resampling_is_one_convolution(resample):
    """Catches res_block "plain" that resamples as "biggan" does, or up-samples after the
    convolution.
    """
    level = Level(
        **dict(features=6, attention=(), resample=resample, res_block="plain", scale_shift=True),
        **dict(head_channels=6, dropout=0.0, dtype=F32, remat="none"),
        **dict(constrain=layers.identity, gather=layers.identity, attend=attend),
    )
    args = normal(1, 2, 4, 8, 6), (), normal(2, 2, 5), None, None, False
    params, p64 = randomized(level, 3, *args)
    assert params.keys() == {"resample"}
    h, outputs = level.apply({"params": params}, *args)
    kernel, bias = p64["resample"]["kernel"], p64["resample"]["bias"]
    down = lambda x: reference.conv3x3(x, kernel, bias, stride=2)
    up = lambda x: reference.conv3x3(reference.up(x), kernel, bias)
    want = {"down": down, "up": up}[resample](f64(args[0]))
    np.testing.assert_allclose(h, want, atol=1e-5)
    assert len(outputs) == 1


def test_mean_pool():
    """Catches a mean over the padded length instead of the caption's."""
    layer = TextPool("mean", 2, 6, F32)
    text, mask = normal(1, 1, 5, 8), lengths(5, 2)
    params, p64 = randomized(layer, 5, text, mask)
    normed = reference.layer_norm(f64(text[0]), p64["norm"]["scale"], p64["norm"]["bias"])
    np.testing.assert_allclose(
        layer.apply({"params": params}, text, mask)[0],
        reference.dense(normed[:2].mean(0), p64["out"]),
        atol=1e-5,
    )


def test_feed_forward():
    """Catches a missing residual or activation."""
    layer = FeedForward(24, F32)
    h = normal(1, 1, 2, 3, 16)
    params, p = randomized(layer, 6, h)
    hidden = reference.swish(
        reference.dense(
            reference.group_norm(f64(h), 4, p["norm"]["scale"], p["norm"]["bias"]), p["dense_0"]
        )
    )
    np.testing.assert_allclose(
        layer.apply({"params": params}, h),
        f64(h) + reference.dense(hidden, p["dense_1"]),
        atol=1e-4,
    )


def test_conv_stride_and_padding():
    """Catches SAME padding of a strided convolution: XLA pads at another side than the paper's
    frameworks.
    """
    layer = layers.Conv(5, F32, stride=2)
    x = normal(1, 1, 6, 4, 3)
    params, p = randomized(layer, 7, x)
    np.testing.assert_allclose(
        layer.apply({"params": params}, x),
        reference.conv3x3(f64(x), p["kernel"], p["bias"], 2),
        atol=1e-4,
    )


def test_group_norm_groups():
    """Catches groups of one channel in narrow layers, and other than 32 groups at the paper's
    widths.
    """
    wanted = {16: 4, 96: 24, 128: 32, 144: 24, 240: 30, 512: 32, 1536: 32, 2: 1}
    assert {c: layers.group_norm(c, F32, "n").num_groups for c in wanted} == wanted


def test_group_norm_statistics_are_fp32():
    """Catches statistics in bfloat16: values with mean 256 and deviation 1 lose their variance."""
    norm = layers.group_norm(16, jnp.bfloat16, "n")
    x = 256 + normal(1, 1, 16, 16, 16)
    out = norm.apply(norm.init(jax.random.key(0), x), x)
    assert out.dtype == jnp.bfloat16 and 0.95 < float(out.astype(F32).std()) < 1.05


def test_space_to_depth():
    """Catches patches that mix pixels of different squares, and an inverse that does not invert."""
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    folded = resampling.space_to_depth(x, 2)
    np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(resampling.depth_to_space(folded, 2), x)


def test_pool_and_upsample():
    """Catches pooling over another window, and up-sampling that exchanges rows and columns."""
    x = normal(1, 1, 4, 6, 2)
    np.testing.assert_allclose(resampling.average_pool(x), reference.pool(np.asarray(x)), atol=1e-6)
    np.testing.assert_array_equal(resampling.upsample_nearest(x), reference.up(np.asarray(x)))


def test_conv_transpose_is_the_adjoint_of_the_strided_convolution():
    """Catches phases, taps or offsets exchanged, rows and columns exchanged, a mirrored kernel."""
    up, h, image = layers.ConvTranspose(4, F32), normal(1, 2, 3, 5, 6), normal(2, 2, 6, 10, 4)
    params = jax.tree.map(lambda a: normal(3, *a.shape), up.init(jax.random.key(0), h)["params"])
    down = {"kernel": params["kernel"].swapaxes(2, 3), "bias": jnp.zeros(6)}
    shrunk = layers.Conv(6, F32, stride=2).apply({"params": down}, image)
    raised = up.apply({"params": params}, h) - params["bias"][None, None, None]
    np.testing.assert_allclose(jnp.sum(h * shrunk), jnp.sum(raised * image), rtol=1e-4)


def test_conv_transpose_keeps_the_variance():
    """Catches an initialiser with the fan-in of all nine weights; an output pixel uses 9/4 on
    average.
    """
    up, h = layers.ConvTranspose(64, F32), normal(1, 4, 8, 8, 64)
    out = up.apply(up.init(jax.random.key(0), h), h)
    assert 0.9 < float(out[:, :-2, :-2].var()) < 1.1


def test_sinusoid():
    """Catches raw log-SNR or t instead of u, and a wrong range of periods."""
    got = layers.sinusoid(jnp.array([-20.0, 0.0, 3.0]), 6)
    u = np.arctan(np.exp([10.0, 0.0, -1.5])) / (np.pi / 2)
    angle = 1000 * u[:, None] * 10_000 ** -(np.arange(3) / 3)
    np.testing.assert_allclose(got, np.concatenate([np.sin(angle), np.cos(angle)], -1), atol=2e-3)


def test_concat_lowres():
    """Catches nearest up-sampling, and low-res channels before those of z."""
    z, low = jnp.zeros((1, 8, 8, 3)), normal(1, 1, 2, 2, 3)
    out = concat_lowres(z, low)
    np.testing.assert_array_equal(out[..., :3], z)
    # Bilinear resampling with half-pixel centres keeps the corners.
    np.testing.assert_allclose(out[0, 0, 0, 3:], low[0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(
        out[0, 0, 3, 3:], low[0, 0, 0] * 0.625 + low[0, 0, 1] * 0.375, atol=1e-5
    )
