"""The objective interface: the loss that a training step minimises.

A `Stage` is the denoising objective.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key

from imagen_jax.diffusion.loss import Draws
from imagen_jax.stage import Batch, Params
from imagen_jax.stage_sizes import Size

QUARTILES = 4


@runtime_checkable
class Objective(Protocol):
    """The loss per row of a batch. Random numbers, except for dropout, are drawn beforehand.

    An objective such as distillation holds a stage and the frozen parameters of its teacher.
    """

    def init(self, key: Key[Array, ""]) -> Params:
        """Initial trainable parameters. Call it under jit or `jax.eval_shape`."""

    def draw(self, key: Key[Array, ""], b: int, size: Size) -> Draws:
        """The random numbers of a step for a whole batch: arrays [b ...].

        size: (height, width) of the images of the batch in pixels.
        """

    def noise_quartile(self, draws: Draws) -> Int[Array, "b"]:
        """The quartile of the training noise that each row is in: 0 (noisiest) to 3."""

    def per_sample_loss(
        self,
        params: Params,
        batch: Batch,
        draws: Draws,
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "b"]:
        """The loss [b] of the rows; deterministic without dropout."""
