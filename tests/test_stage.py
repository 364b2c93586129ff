"""A stage's sampling: what the network is told, and the numbers that a key gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.stage import Stage, to_unit
from tests import tiny

PINNED = (-0.958448, -0.721948)  # computed at commit 1310c20 with jax 0.10.2


def sample(name, monkeypatch, denoise, **sampling):
    """Two samples of a tiny stage whose network is `denoise(z, logsnr, cond)`, and their batch."""
    stage, _, _ = tiny.stage_and_step(tiny.config(name))
    monkeypatch.setattr(Stage, "denoiser", lambda stage, params, key=None: denoise)
    monkeypatch.setattr(Stage, "with_text_values", lambda stage, params, cond, size: cond)
    batch = jax.device_put(tiny.batch(stage, 2))
    keys = jax.random.split(jax.random.key(3), 2)
    settings = {**stage.sampling, "w": 1.0, "steps": 2, **sampling}
    return np.asarray(stage.sample({}, keys, batch, settings, stage.buckets[0])), batch


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_the_low_res_image_is_noised_to_the_given_level(level, monkeypatch):
    """Catches an aug_level that sampling ignores, or a network that is told another one."""
    seen = []

    def denoise(z, logsnr, cond):
        seen.append((cond["lowres"], cond["lowres_logsnr"]))
        return jnp.zeros_like(z)

    _, batch = sample("sr_256", monkeypatch, denoise, aug_level=level)
    lowres, logsnr = map(np.asarray, seen[0])
    x = np.asarray(to_unit(batch["lowres"]))
    if level == 0.0:
        np.testing.assert_allclose(lowres, x, atol=1e-3)
    else:
        # Cosine schedule: alpha = cos(pi t / 2), sigma = sin(pi t / 2).
        alpha, sigma = np.cos(np.pi * level / 2), np.sin(np.pi * level / 2)
        np.testing.assert_allclose(logsnr, 2 * np.log(alpha / sigma), rtol=1e-3)
        noise = (lowres - alpha * x) / sigma
        assert abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.15


def test_a_key_gives_the_same_numbers_as_ever(monkeypatch):
    """Catches another derivation of keys, or another order of draws: every picture would change."""
    samples, _ = sample("sr_256", monkeypatch, lambda z, logsnr, cond: z + cond["lowres"].mean())
    np.testing.assert_allclose(samples[:, 3, 5, 1], PINNED, atol=1e-3)
