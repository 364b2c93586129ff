r"""The Efficient U-Net as 64x64 base model, beside the ordinary U-Net of base_64.py:width=256
(everything but the network is its).

    python -m imagen_jax.train --config configs/base_64_efficient.py --config.data.path=PREPARED \
        --workdir WORKDIR

Not in the paper, which uses the Efficient U-Net for super-resolution only (Appendix B.1). 450M
parameters with text (546M in the other). Levels at 32, 16 and 8, attention with text at 16 and 8.
Arguments: `:demo` for 16x16 on two CPU cores, `:tiny` for tests.
"""

from ml_collections import ConfigDict

from configs import base_64


def get_config(arg: str = "") -> ConfigDict:
    """The run's complete record; `arg` is "", "demo" or "tiny"."""
    if arg not in SIZES:
        raise ValueError(f"base_64_efficient has no variant {arg!r}; use 'demo' or 'tiny'")
    c = base_64.get_config(arg or "width=256").unlock()
    c.name = f"{c.name}_efficient"
    c.model = ConfigDict(
        dict(
            family="efficient_unet",
            **SIZES[arg],
            pooling="attention",
            residual_scale=2**-0.5,
            scale_shift=True,
            dropout=0.0,
            dtype=c.model.dtype,
            remat=c.model.remat,
        )
    )
    return c.lock()


SIZES = {
    "": dict(
        widths=(256, 512, 1024),
        blocks=(2, 4, 8),
        attention=("none", "fused", "fused"),
        heads=8,
        cond_dim=512,
        pool_heads=8,
    ),
    "demo": dict(
        widths=(96, 192),
        blocks=(2, 4),
        attention=("none", "fused"),
        heads=6,
        cond_dim=192,
        pool_heads=6,
    ),
    "tiny": dict(
        widths=(16, 32),
        blocks=(1, 1),
        attention=("none", "fused"),
        heads=2,
        cond_dim=16,
        pool_heads=2,
    ),
}
