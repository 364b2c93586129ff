"""The number of images that a state has been trained on."""

from imagen_jax.training.start import examples_seen


def test_examples_of_forks():
    """Catches a fork that counts its parent's steps with its own batch size, or not at all."""
    assert examples_seen(10, 8, {}) == 80
    assert examples_seen(10, 8, {"init_from": {"step": 5}}) == 80
    child = {"fork": {"step": 10, "examples": 80}}
    assert examples_seen(10, 32, child) == 80 and examples_seen(13, 32, child) == 80 + 3 * 32
    grandchild = {"fork": {"step": 13, "examples": examples_seen(13, 32, child)}}
    assert examples_seen(14, 2, grandchild) == 80 + 96 + 2
    assert examples_seen(12, 8, {"fork": {"step": 10}}) == 96  # of an earlier version
