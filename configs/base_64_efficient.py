r"""The Efficient U-Net as 64x64 base model, 450M parameters with text. Not in the paper.

    python -m imagen_jax.train --config configs/base_64_efficient.py --config.data.path=PREPARED \
        --workdir WORKDIR
    python -m imagen_jax.train --config configs/base_64_efficient.py:demo \
        --config.data.path=data/emoji --workdir runs/base_efficient --minutes 5

CPU: the second command trains `:demo` on two cores, on data/emoji of the README, for 5 minutes and
saves. Expect a loss of 0.17 after 71 steps, and 33 images/s on two busy cores, more on idle ones.

It differs from base_64.py:width=256 (546M) in the network only. The paper uses the Efficient U-Net
for super-resolution only (Appendix B.1). Levels at 32, 16 and 8; attention with text at 16 and 8.

Hardware: none was tried or planned at this size.
Expect: not trained yet, so no loss or time is known.
Recorded: nowhere yet. BENCHMARKS.md, "Efficient U-Net against the ordinary U-Net" compares the two
networks at 64->256, at a quarter of the super-resolution width.

Variants: `:demo` for 16x16 on two CPU cores, trained for 71 steps only; `:tiny` for tests, seconds.
"""

from ml_collections import ConfigDict

from configs import base_64


def get_config(arg: str = "") -> ConfigDict:
    """The complete config; `arg` is "", "demo" or "tiny"."""
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
