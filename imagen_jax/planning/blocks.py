"""The blocks of a network, and the program of one block that is compiled to estimate its time.

A block is what a level of a network calls: a residual block, an attention layer, a convolution.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imagen_jax.models.attention import Attention, FeedForward
from imagen_jax.models.blocks import ResBlock
from imagen_jax.models.efficient_unet import Blocks, EfficientUNet
from imagen_jax.models.remat import checkpointed
from imagen_jax.models.unet import Level, UNet
from imagen_jax.stage import Stage

CONTAINERS = (UNet, EfficientUNet, Level, Blocks)  # modules that only call other modules
NO_INPUT_GRADIENT = ("stem", "conditioning")  # blocks whose input has no trainable parameters
# The modules that each value of `model.remat` wraps.
CHECKPOINTED = {"none": (), "matrix": (ResBlock,), "block": (ResBlock, Attention, FeedForward)}
Tree = Any


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of the network.

    Fields:
        module: the module, without a parent.
        args: the arguments of its call; arrays as shapes.
        params: shapes of its parameters.
        paths: module paths of all equal blocks, such as "down_2/block_0".
    """

    module: Any
    args: tuple[Any, ...]
    params: Tree
    paths: tuple[str, ...]

    @property
    def has_input_gradient(self) -> bool:
        """Whether the backward pass needs the gradient of the block's input."""
        return not self.paths[0].startswith(NO_INPUT_GRADIENT)


def block_calls(run: Callable[[], Any]) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Every block that `run` calls: {module path: (module without a parent, arguments)}.

    Array arguments are returned as shapes. Modules that a block calls are part of the block.
    """
    calls: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {}
    open_blocks: list[str] = []

    def intercept(call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if open_blocks or context.method_name != "__call__" or isinstance(module, CONTAINERS):
            return call(*args, **kwargs)
        assert not kwargs, f"{path} is called with keyword arguments, which are not recorded"
        calls[path] = (module.clone(parent=None, name=None), jax.tree.map(_shape, args))
        open_blocks.append(path)
        try:
            return call(*args, **kwargs)
        finally:
            open_blocks.pop()

    with nn.intercept_methods(intercept):
        run()
    return calls


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


def find_blocks(stage: Stage, b: int) -> list[Block]:
    """The blocks of a stage's loss for `b` images of the largest bucket. Equal ones are one entry.

    The modules are not wrapped by `model.remat`; `block_program` applies it.
    """
    stage = dataclasses.replace(stage, model=stage.model.clone(remat="none"))
    size = stage.largest_bucket
    shapes = stage.batch_shapes(b, size)
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    params = jax.eval_shape(stage.init, jax.random.key(0))
    loss = lambda p, x, key: stage.per_sample_loss(p, x, stage.draw(key, b, size), key)
    calls = block_calls(lambda: jax.eval_shape(loss, params, batch, jax.random.key(0)))
    blocks: dict[str, Block] = {}
    for path, (module, args) in calls.items():
        block_params = functools.reduce(lambda tree, name: tree[name], path.split("/"), params)
        key = repr((module, args, path.startswith(NO_INPUT_GRADIENT)))
        paths = blocks[key].paths if key in blocks else ()
        blocks[key] = Block(module, args, block_params, (*paths, path))
    return list(blocks.values())


def block_program(stage: Stage, block: Block) -> tuple[Any, Any, tuple[Any, ...]]:
    """The forward pass of a block, its forward and backward pass, and their arguments' shapes.

    Returns (forward, both, shapes):

        forward(params, varying, constant)          -> outputs
        both(params, varying, constant, gradients)  -> outputs, gradients of (params, varying)

    `varying` are the arguments with a gradient and `constant` the other arrays. Kernels and their
    gradients have the network's compute type, as in the all-gathers and reductions of the step.
    """
    leaves, tree = jax.tree.flatten(block.args)
    is_array = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]
    varies = [
        a and jnp.issubdtype(leaf.dtype, jnp.floating) and block.has_input_gradient
        for a, leaf in zip(is_array, leaves)
    ]
    is_constant = [a and not v for a, v in zip(is_array, varies)]
    pick = lambda flags: tuple(leaf for leaf, flag in zip(leaves, flags) if flag)

    def forward(params: Tree, varying: tuple[Any, ...], constant: tuple[Any, ...]) -> list[Any]:
        varying, constant = iter(varying), iter(constant)
        args = [
            next(varying) if v else next(constant) if c else leaf
            for leaf, v, c in zip(leaves, varies, is_constant)
        ]
        out = block.module.apply(
            {"params": params},
            *jax.tree.unflatten(tree, args),
            rngs={"dropout": jax.random.key(0)},
        )
        return [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    is_wrapped = isinstance(block.module, CHECKPOINTED[stage.model.remat])
    remat = functools.partial(checkpointed, stage.model.remat if is_wrapped else "none")

    def both(
        params: Tree, varying: tuple[Any, ...], constant: tuple[Any, ...], gradients: list[Any]
    ):
        out, backward = jax.vjp(remat(lambda p, v: forward(p, v, constant)), params, varying)
        return out, backward(gradients)

    dtype = stage.model.dtype
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, dtype if len(p.shape) > 1 else p.dtype),
        block.params,
    )
    shapes = (params, pick(varies), pick(is_constant))
    return forward, both, (*shapes, jax.eval_shape(forward, *shapes))
