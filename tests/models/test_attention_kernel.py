"""The TPU attention kernel, interpreted: values and gradients equal those of `attend`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import sharding
from imagen_jax.models.attention import attend
from imagen_jax.models.attention_kernel import QUERIES, fits, flash_attend
from imagen_jax.sharded_attention import attend_in_parts

interpreted = functools.partial(flash_attend, interpret=True)


def case(n, image_keys, text_keys, heads, channels, b=2, dtype=jnp.float32):
    """(q, groups of (k, v), mask of the text tokens; captions get shorter row by row)."""
    wide = heads * channels
    keys = jax.random.split(jax.random.key(n), 5)
    lengths = (n, image_keys, image_keys, text_keys, text_keys)
    q, *kv = (
        jax.random.normal(key, (b, length, wide), dtype) for key, length in zip(keys, lengths)
    )
    valid = jnp.arange(text_keys)[None] < jnp.maximum(1, text_keys - 3 * jnp.arange(b))[:, None]
    return q, kv, valid


def grouped(kv, valid):
    (k, v, text_k, text_v) = kv
    return ((k, v, None), *([(text_k, text_v, valid)] if text_k.shape[1] else []))


@pytest.mark.parametrize(
    "n, image_keys, text_keys, heads, channels",
    [
        pytest.param(64, 64, 20, 4, 64, marks=pytest.mark.slow),
        (2 * QUERIES, 128, 128, 1, 128),
        (16, 40, 7, 8, 32),
        (32, 32, 0, 2, 64),
    ],
    ids=["two heads a vector, padded text", "two blocks of queries", "padded pixels", "no text"],
)
def test_kernel_is_attend(n, image_keys, text_keys, heads, channels):
    """Catches lanes of another head, attention to padding, a separate softmax for each group of
    keys, and sums over one block of queries only.
    """
    q, kv, valid = case(n, image_keys, text_keys, heads, channels)
    plain, plain_vjp = jax.vjp(lambda q, kv: attend(q, grouped(kv, valid), heads), q, kv)
    kernel, kernel_vjp = jax.vjp(lambda q, kv: interpreted(q, grouped(kv, valid), heads), q, kv)
    np.testing.assert_allclose(kernel, plain, atol=3e-6)
    d_out = jax.random.normal(jax.random.key(1), plain.shape)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        kernel_vjp(d_out),
        plain_vjp(d_out),
    )


def test_kernel_in_bf16_is_as_near_as_attend():
    """Catches scores or sums in bf16. Their error is several times that of rounding inputs and
    outputs.
    """
    q, kv, valid = case(128, 128, 64, 2, 64)
    cast = lambda tree, dtype: jax.tree.map(lambda a: a.astype(dtype), tree)
    q, kv = cast((q, kv), jnp.bfloat16)
    exact = attend(cast(q, jnp.float32), grouped(cast(kv, jnp.float32), valid), 2)
    error = lambda f: float(
        jnp.sqrt(jnp.mean((f(q, grouped(kv, valid), 2).astype(jnp.float32) - exact) ** 2))
    )
    assert error(interpreted) < 1.2 * error(attend)


@pytest.mark.parametrize(
    "sizes", [(4, 2, 1, 1), (1, 2, 2, 2)], ids=["rows", "rows, heads and pixels"]
)
def test_parts_of_a_mesh(sizes):
    """Catches heads counted for the whole width, keys limited to a device's own pixels, and mask
    rows of another device.
    """
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)))
    q, kv, valid = case(64, 64, 16, 4, 64, b=8)
    never = lambda *_: pytest.fail("the shapes fit, but the kernel was not used")
    on_mesh = jax.jit(
        lambda q, kv: attend_in_parts(mesh, interpreted, never, q, grouped(kv, valid), 4)
    )
    np.testing.assert_allclose(on_mesh(q, kv), attend(q, grouped(kv, valid), 4), atol=3e-6)


def test_what_does_not_fit_is_computed_plainly():
    """Catches the kernel used on rows or heads that do not divide evenly."""
    mesh = sharding.make_mesh({"data": 4, "fsdp": 1, "model": 2, "spatial": 1})
    kernel = lambda *_: pytest.fail("the kernel was used")
    for b, heads in ((6, 4), (8, 3)):
        q, kv, valid = case(16, 16, 8, heads, 64, b=b)
        out = attend_in_parts(mesh, kernel, attend, q, grouped(kv, valid), heads)
        np.testing.assert_array_equal(out, attend(q, grouped(kv, valid), heads))
    assert (
        fits(1024, 1152, 1024, 16)
        and not fits(1024, 1152, 1024, 5)
        and not fits(8, 64, 128, 2)
        and not fits(1024, 9000, 1024, 16)
    )
