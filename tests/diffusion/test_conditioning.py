"""Dropped text, the null text, and noise augmentation of the low-res image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import conditioning
from imagen_jax.diffusion.schedule import cosine, linear


def text_cond(lengths, width=4, length=6, seed=0, dtype=jnp.float32):
    """cond with random text features of these lengths, zero at padding, and its mask."""
    mask = np.arange(length)[None] < np.asarray(lengths)[:, None]
    text = (
        np.random.default_rng(seed).standard_normal((len(lengths), length, width)) * mask[..., None]
    )
    return {"text": jnp.asarray(text, dtype), "text_mask": jnp.asarray(mask)}


def test_drop_text_drops_only_selected_samples():
    """Catches an inverted drop flag, and one flag for the whole batch."""
    cond = text_cond([3, 6, 1])
    dropped = conditioning.drop_text(cond, jnp.array([False, True, False]))
    for row in (0, 2):
        np.testing.assert_array_equal(dropped["text"][row], cond["text"][row])
        np.testing.assert_array_equal(dropped["text_mask"][row], cond["text_mask"][row])
    np.testing.assert_array_equal(dropped["text"][1], 0.0)
    np.testing.assert_array_equal(dropped["text_mask"][1], [True] + 5 * [False])


def test_null_text_does_not_know_the_dropped_caption():
    """Catches a null text with the caption's mask, which reveals its length; and an empty mask,
    whose softmax is NaN.
    """
    short, long = (conditioning.null_text(text_cond([n, n], seed=n)) for n in (1, 6))
    jax.tree.map(np.testing.assert_array_equal, short, long)
    assert np.all(np.sum(short["text_mask"], axis=1) == 1)
    weights = jax.nn.softmax(jnp.where(short["text_mask"], 0.0, -jnp.inf), axis=1)
    assert np.all(np.isfinite(weights))


def test_null_text_of_padding_features_is_zero():
    """Catches dropping by multiplication, which turns a NaN or infinite feature into NaN."""
    cond = text_cond([2, 2])
    cond["text"] = cond["text"].at[:, 3].set(jnp.inf)
    np.testing.assert_array_equal(conditioning.null_text(cond)["text"], 0.0)


def test_null_text_keeps_everything_else():
    """Catches an unconditional evaluation without the low-res image or its noise level, and a
    function that changes its input.
    """
    cond = text_cond([2, 3], dtype=jnp.bfloat16) | {
        "lowres": jnp.ones((2, 2, 2, 3)),
        "lowres_logsnr": jnp.array([1.0, 2.0]),
    }
    before = dict(cond)
    null = conditioning.null_text(cond)
    assert null["lowres"] is cond["lowres"] and null["lowres_logsnr"] is cond["lowres_logsnr"]
    assert null["text"].dtype == jnp.bfloat16 and null["text_mask"].dtype == bool
    assert all(cond[name] is before[name] for name in before)


def test_no_text_means_nothing_to_drop():
    """Catches text added for a model without text."""
    cond = {"lowres": jnp.ones((2, 2, 2, 3))}
    assert conditioning.drop_text(cond, jnp.array([True, True])) == cond


@pytest.mark.parametrize("schedule", [cosine, linear])
def test_augmentation_noises_each_image_at_its_own_level(schedule):
    """Catches one level for the whole batch, the noised image under a key that the network does not
    read, and a reported level that is not the applied one.
    """
    rng = np.random.default_rng(0)
    lowres, eps = (jnp.asarray(rng.standard_normal((3, 4, 4, 3)), jnp.float32) for _ in range(2))
    level = jnp.array([0.1, 0.5, 0.9])
    cond = conditioning.augment_lowres({"lowres": lowres}, eps, level, schedule)
    assert set(cond) == {"lowres", "lowres_logsnr"}
    logsnr = np.asarray(schedule(level), np.float64)
    np.testing.assert_allclose(cond["lowres_logsnr"], logsnr, rtol=1e-6)
    alpha, sigma = ((1 / (1 + np.exp(sign * logsnr))) ** 0.5 for sign in (-1, 1))
    expected = alpha[:, None, None, None] * np.asarray(lowres) + sigma[
        :, None, None, None
    ] * np.asarray(eps)
    np.testing.assert_allclose(cond["lowres"], expected, atol=1e-5)


def test_augmentation_level_0_leaves_the_image_and_1_leaves_noise():
    """Catches a reversed level: 0 is the clean image (the paper's best FID), 1 is noise."""
    lowres, eps = jnp.full((2, 2, 2, 3), 0.5), jnp.full((2, 2, 2, 3), -2.0)
    cond = conditioning.augment_lowres({"lowres": lowres}, eps, jnp.array([0.0, 1.0]), cosine)
    np.testing.assert_allclose(cond["lowres"][0], 0.5, atol=2e-4)
    np.testing.assert_allclose(cond["lowres"][1], -2.0, atol=2e-4)


def test_augmentation_keeps_the_text():
    """Catches a new cond that has only the low-res image."""
    cond = text_cond([2]) | {"lowres": jnp.zeros((1, 2, 2, 3))}
    augmented = conditioning.augment_lowres(cond, jnp.ones((1, 2, 2, 3)), jnp.array([0.5]), cosine)
    assert augmented["text"] is cond["text"] and augmented["text_mask"] is cond["text_mask"]
    np.testing.assert_array_equal(cond["lowres"], 0.0)
