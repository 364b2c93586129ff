"""Spoils batches of a training run, for tests of what it does with bad steps.

A batch becomes bad after it was decoded: its text is NaN, or its images are all black or all white.
`Stage.per_sample_loss` is replaced by one whose gradient is too large for such images: it overflows
for black ones and is finite for white ones. The loss itself stays as it is.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.stage import Stage
from imagen_jax.training.run import Run

OVERFLOW, SPIKE = 1e30, 1e4


def spoiled(batch, kind):
    """A batch that is bad: "text" (NaN), "black" (gradient overflow) or "white" (spike)."""
    if kind == "text":
        return batch | {"text": np.full_like(batch["text"], np.nan)}
    return batch | {"image": np.full_like(batch["image"], {"black": 0, "white": 255}[kind])}


def apply(kinds, setattr=setattr):
    """Spoils the batches {step, from 0: kind} of every run.

    setattr: that of pytest's monkeypatch undoes it.
    """
    batches, loss = Run.batches, Stage.per_sample_loss

    def spoiled_batches(run, step, rows=None):
        for n, batch in enumerate(batches(run, step, rows), step):
            yield spoiled(batch, kinds[n]) if n in kinds else batch

    def surging_loss(stage, params, batch, draws, dropout_key=None):
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)[:1])
        black, white = ((batch["image"] == value).all() for value in (0, 255))
        surge = jnp.where(black, OVERFLOW, jnp.where(white, SPIKE, 0.0))
        losses = loss(stage, params, batch, draws, dropout_key)
        return losses + surge * (total - jax.lax.stop_gradient(total))

    setattr(Run, "batches", spoiled_batches)
    setattr(Stage, "per_sample_loss", surging_loss)


def main():
    """Runs the trainer with the batches of $POISON spoiled: "2:text,5:black"."""
    import runpy

    pairs = (entry.split(":") for entry in os.environ["POISON"].split(","))
    apply({int(step): kind for step, kind in pairs})
    runpy.run_module("imagen_jax.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
