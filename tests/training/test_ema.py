"""EMA tracks: their rule, and several of them in one state."""

import math

import jax.numpy as jnp
import numpy as np

from imagen_jax.training import ema
from imagen_jax.training.state import initial_state
from tests import quadratic


def test_decay_warms_up():
    """Catches a constant decay, under which early samples are those of the initial weights."""
    got = [float(ema.FixedDecay(0.999).decay(jnp.asarray(n))) for n in (0, 8, 10**6)]
    np.testing.assert_allclose(got, [0.1, 0.5, 0.999], rtol=1e-6)


def test_share_of_the_initial_weights():
    """Catches a slower warm-up, with which short runs would compare their initial weights."""
    track, share = ema.FixedDecay(0.9999), {0: jnp.ones(())}
    for n in range(10):
        share[n + 1] = ema.follow(track, share[n], jnp.zeros(()), jnp.asarray(n))
    assert float(share[1]) <= 0.1 + 1e-7
    for n in (1, 2, 3, 10):
        expected = math.factorial(9) * math.factorial(n) / math.factorial(n + 9)
        np.testing.assert_allclose(share[n], expected, rtol=1e-5)


def test_every_track_follows_the_parameters_by_its_own_decay():
    """Catches tracks that share one decay, are swapped, follow the old parameters or follow one
    another.
    """
    changes = dict(optim__ema=0.9, optim__ema_tracks=(0.5, 0.0))
    _, objective, optimizer, step = quadratic.objective_and_step(**changes)
    state = initial_state(objective, optimizer, 0, 2)
    for _ in range(12):
        before, (state, _) = state, step(state, quadratic.batch())
    leaf = lambda tree: np.asarray(tree["stem"]["kernel"], np.float64)
    warm = 12 / 21  # of step 11
    for decay, old, new in zip(
        (min(0.9, warm), 0.5, 0.0),
        (before.ema, *before.ema_tracks),
        (state.ema, *state.ema_tracks),
        strict=True,
    ):
        np.testing.assert_allclose(
            leaf(new), decay * leaf(old) + (1 - decay) * leaf(state.params), rtol=1e-5, atol=1e-7
        )
    np.testing.assert_array_equal(leaf(state.ema_tracks[1]), leaf(state.params))
    assert np.abs(leaf(state.ema) - leaf(state.ema_tracks[0])).max() > 0
