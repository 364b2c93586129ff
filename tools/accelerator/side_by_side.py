"""DeepFloyd IF-I-M's U-Net in PyTorch and in this package: bf16, forward and backward.

Ours has the same widths, blocks and attention. It differs in what costs little: swish for gelu,
LayerNorm on text in each attention layer, and text pooled after its projection.
"""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

from tools.accelerator import measuring

WIDTHS, BLOCKS, TOKENS = (192, 384, 576, 768), 3, 77
TINY_WIDTHS, TINY_BLOCKS = (64, 128), 1
REPEATS = 10


def run(
    emit: Callable,
    framework: str,
    batches: Sequence[int],
    compiled: bool,
    tiny: bool,
    gate: str = "",
) -> None:
    """Times "torch" (compiled: with torch.compile) or "jax" for each batch.

    "jax" compiles everything before the file `gate` opens the device.
    """
    if framework == "jax":
        ours(emit, batches, tiny, gate)
    else:
        torchs(emit, batches, tiny, compiled)


def ours(emit: Callable, batches: Sequence[int], tiny: bool, gate: str) -> None:
    """This package's U-Net."""
    import jax
    import jax.numpy as jnp

    from tools.accelerator import models

    emit("about", **measuring.about())
    model, size, text_dim = jax_unet(tiny), 16 if tiny else 64, 64 if tiny else 4096
    inputs = lambda b: (
        models.hashed((b, size, size, 3), 1),
        jnp.linspace(-5.0, 5.0, b),
        {
            "text": models.hashed((b, TOKENS, text_dim), 2).astype(jnp.bfloat16),
            "text_mask": jnp.ones((b, TOKENS), bool),
        },
    )
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs(1)))["params"]
    make = lambda: models.parameters(shapes, jnp.bfloat16)
    loss = lambda p, *args: jnp.mean(model.apply({"params": p}, *args) ** 2)
    passes = {
        "forward": lambda p, *args: model.apply({"params": p}, *args),
        "forward and backward": jax.value_and_grad(loss),
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    programs = {}
    for b in batches:
        for name, function in passes.items():
            started = time.monotonic()
            abstract = jax.eval_shape(lambda: (make(), *inputs(b)))
            program = jax.jit(function).lower(*abstract).compile()
            programs[b, name] = program, time.monotonic() - started
    measuring.wait_for(gate)
    params = jax.jit(make)()
    for (b, name), (program, took) in programs.items():
        args = jax.jit(lambda b=b: inputs(b))()
        once = lambda: measuring.seconds_of(lambda: program(params, *args))
        emit_timing(emit, "imagen_jax, jit", count, b, name, once, compile_s=took)


def jax_unet(tiny: bool) -> Any:
    """This package's U-Net at the shape of IF-I-M."""
    import jax.numpy as jnp

    from tools.accelerator import package

    widths, blocks = (TINY_WIDTHS, TINY_BLOCKS) if tiny else (WIDTHS, BLOCKS)
    attends = (False,) + (True,) * (len(widths) - 1)
    return package.UNet(
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=blocks,
        attention=attends,
        text_attention=attends,
        head_channels=64,
        cond_dim=widths[-1],
        pooling="attention",
        pool_heads=widths[-1] // 64,
        res_block="biggan",
        scale_shift=True,
        patch=1,
        lowres=False,
        dropout=0.0,
        dtype=jnp.bfloat16,
        remat="none",
    )


def torchs(emit: Callable, batches: Sequence[int], tiny: bool, compiled: bool) -> None:
    """PyTorch's network: diffusers' UNet2DConditionModel if installed, else `torch_unet`."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, implementation = torch_network(tiny)
    network = network.to(device, torch.bfloat16).to(memory_format=torch.channels_last).eval()
    count = sum(p.numel() for p in network.parameters())
    if compiled:
        network, implementation = torch.compile(network), f"{implementation}, torch.compile"
    size, text_dim = 16 if tiny else 64, 64 if tiny else 4096
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for b in batches:
        like = dict(device=device, dtype=torch.bfloat16)
        z = torch.randn(b, 3, size, size, **like).to(memory_format=torch.channels_last)
        times = torch.linspace(1.0, 999.0, b, device=device)
        text = torch.randn(b, TOKENS, text_dim, **like)

        def forward():
            with torch.no_grad():
                network(z, times, text)

        def both():
            network.zero_grad(set_to_none=True)
            network(z, times, text).square().mean().backward()

        for name, call in {"forward": forward, "forward and backward": both}.items():
            started = time.monotonic()
            waited(call, wait)
            took = time.monotonic() - started
            once = lambda: waited(call, wait)
            emit_timing(emit, implementation, count, b, name, once, compile_s=took)
        gc.collect()


def torch_network(tiny: bool) -> tuple[Any, str]:
    """(network of (z, time, text), its description)."""
    from tools.accelerator import torch_unet

    if tiny:
        return torch_unet.UNet(TINY_WIDTHS, TINY_BLOCKS, 64), "PyTorch, own module, eager"
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        return torch_unet.UNet(**torch_unet.IF_I_M), "PyTorch, own module, eager"
    return diffusers_network(UNet2DConditionModel), "PyTorch, diffusers, eager"


def diffusers_network(network: type) -> Any:
    """diffusers' network with IF-I-M's config, called as (z, time, text) -> array."""
    import torch

    cross, resnet = "SimpleCrossAttn{}Block2D", "Resnet{}sampleBlock2D"

    class Unwrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network(
                sample_size=64, in_channels=3, out_channels=6,
                down_block_types=[resnet.format("Down")] + 3 * [cross.format("Down")],
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                up_block_types=3 * [cross.format("Up")] + [resnet.format("Up")],
                block_out_channels=list(WIDTHS), layers_per_block=BLOCKS, act_fn="gelu",
                cross_attention_dim=WIDTHS[-1], encoder_hid_dim=4096,
                encoder_hid_dim_type="text_proj", attention_head_dim=64,
                addition_embed_type="text", addition_embed_type_num_heads=64,
                resnet_time_scale_shift="scale_shift", cross_attention_norm="group_norm",
            )  # fmt: skip

        def forward(self, z, times, text):
            return self.network(z, times, text).sample

    return Unwrapped()


def waited(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Seconds of a call, including all its kernels."""
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def emit_timing(
    emit: Callable, implementation: str, count: int, b: int, name: str, once: Callable, **more: Any
) -> None:
    """Times a pass and writes its record."""
    once()
    timing = measuring.median([once() for _ in range(REPEATS)])
    speed = {"images_per_s": b / timing["seconds"]}
    key = {"implementation": implementation, "parameters": count, "batch": b, "pass": name}
    emit("timed", **key, **timing, **speed, **more)
