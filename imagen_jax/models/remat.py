"""Rematerialization policies (`model.remat`): the arrays that the backward pass recomputes.

none     stores every intermediate array
matrix   stores the outputs of convolutions and of matrix products with a kernel; recomputes
         attention weights, and the norms and activations of residual blocks
block    stores the inputs of each block; recomputes everything inside
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

STORED = "stored"  # checkpoint name of the arrays that `mark_stored` marks


def mark_stored(tree: Any) -> Any:
    """Marks arrays that "matrix" stores in addition to the outputs of matrix products."""
    return checkpoint_name(tree, STORED)


def checkpointed(kind: str, function: Callable) -> Callable:
    """Applies `jax.checkpoint` to `function` with the policy of `kind` (none: no wrapper)."""
    return function if kind == "none" else jax.checkpoint(function, policy=POLICIES[kind]())


def checkpointed_module(
    kind: str,
    module: type[nn.Module],
    static_argnums: tuple[int, ...] = (),
    skip_matrix: bool = False,
) -> Callable[..., nn.Module]:
    """Wraps a module class so that the backward pass recomputes its call.

    Args:
        kind: one of `KINDS`.
        module: the module class.
        static_argnums: static arguments of the call, counted from self = 0.
        skip_matrix: does not wrap the module under "matrix". For modules whose matrix products have
            inputs about as large as their outputs: there recomputation saves little memory.
            (Wrapping also adds one rounding pass over each stored output.)
    """
    if kind == "none" or (kind == "matrix" and skip_matrix):
        return module
    return nn.remat(module, static_argnums=static_argnums, policy=POLICIES[kind]())


def _is_matrix_product(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether a primitive is a convolution or a product with a kernel.

    Products of two activations (attention scores) have batch dimensions and are recomputed.
    """
    batch = params["dimension_numbers"][1] if primitive.name == "dot_general" else ((), ())
    return primitive.name in ("conv_general_dilated", "dot_general") and not batch[0]


POLICIES = {
    "matrix": lambda: jax.checkpoint_policies.save_from_both_policies(
        _is_matrix_product, jax.checkpoint_policies.save_only_these_names(STORED)
    ),
    "block": lambda: None,
}
KINDS = ("none", *POLICIES)
