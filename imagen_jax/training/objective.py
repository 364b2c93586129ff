"""The objective interface: the loss that a training step minimises. Denoising is the only one."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Key

from imagen_jax.stage import Batch, Params


@runtime_checkable
class Objective(Protocol):
    """A loss of each row of a batch, its randomness drawn first.

    A `Stage` is the denoising objective. Another one, such as distillation, holds a stage and the
    frozen parameters of its teacher.
    """

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters to train; meant to be traced."""

    def draw(self, key: Key[Array, ""], b: int) -> dict[str, Array]:
        """The random numbers of a step for a whole batch of `b` rows, each array with a row for
        each.
        """

    def per_sample_loss(
        self,
        params: Params,
        batch: Batch,
        draws: dict[str, Array],
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "b"]:
        """The loss of each row; a deterministic function but for dropout."""
