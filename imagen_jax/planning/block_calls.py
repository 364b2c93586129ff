"""Which blocks a network is made of, found by running it: for what is compiled or measured block by
block.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from imagen_jax.models.efficient_unet import Blocks, EfficientUNet
from imagen_jax.models.unet import Level, UNet

CONTAINERS = (UNet, EfficientUNet, Level, Blocks)  # they only call what they are made of


def block_calls(run: Callable[[], Any]) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """{place: (module without a parent, arguments)} of every block that `run` calls; array
    arguments as their shapes.

    A block is what a container calls, whole: what it calls itself is part of it.
    """
    calls: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {}
    inside: list[str] = []

    def record(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if inside or context.method_name != "__call__" or isinstance(module, CONTAINERS):
            return call(*args, **kwargs)
        assert not kwargs, f"{path} is called with keywords, which would be left out"
        calls[path] = (module.clone(parent=None, name=None), jax.tree.map(_shape, args))
        inside.append(path)
        try:
            return call(*args, **kwargs)
        finally:
            inside.pop()

    with nn.intercept_methods(record):
        run()
    return calls


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf
