"""What the backward pass computes again instead of reading it from memory (`model.remat`), block by
block.

none     nothing: every intermediate array is kept matrix   attention weights, and the norms and
activations of residual blocks; outputs of convolutions and matrix products are kept block
everything inside a block; its inputs are kept
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

KINDS = ("none", "matrix", "block")
KEPT = "kept"


def keep(tree: Any) -> Any:
    """Marks arrays that `matrix` keeps although no matrix product made them."""
    return checkpoint_name(tree, KEPT)


def check_kind(kind: str) -> None:
    """Raises ValueError for a kind that does not exist."""
    if kind not in KINDS:
        raise ValueError(f"model.remat is {kind!r}; it must be one of {KINDS}")


def checkpointed(kind: str, function: Callable) -> Callable:
    """`function`, recomputed in the backward pass as far as `kind` says."""
    return function if kind == "none" else jax.checkpoint(function, policy=_policy(kind))


def checkpointed_module(
    kind: str,
    module: type[nn.Module],
    static_argnums: tuple[int, ...] = (),
    keeps_itself: bool = False,
) -> Callable[..., nn.Module]:
    """The module class with its call recomputed; `static_argnums` count from self = 0.

    `keeps_itself`: under `matrix` it is left alone, because what its matrix products read is little
    more than what they make. (What is kept of a checkpointed call is also rounded, a pass over the
    array where no other is there to do it.)
    """
    if kind == "none" or (kind == "matrix" and keeps_itself):
        return module
    return nn.remat(module, static_argnums=static_argnums, policy=_policy(kind))


def _policy(kind: str) -> Callable | None:
    check_kind(kind)
    if kind == "block":
        return None
    return jax.checkpoint_policies.save_from_both_policies(
        _is_matrix_product, jax.checkpoint_policies.save_only_these_names(KEPT)
    )


def _is_matrix_product(primitive: Any, *_: Any, **params: Any) -> bool:
    """Convolutions and products with a kernel. Products of two activations (attention scores) have
    batch dimensions, and are not kept.
    """
    batch = params["dimension_numbers"][1] if primitive.name == "dot_general" else ((), ())
    return primitive.name in ("conv_general_dilated", "dot_general") and not batch[0]
