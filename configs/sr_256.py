r"""The 64->256 super-resolution model (F.2): Efficient U-Net, 128 TPU v4 chips in the paper, 2.5M
steps of 2048 images.

    python -m imagen_jax.train --config configs/sr_256.py --config.data.path=PREPARED \
        --workdir WORKDIR

The paper's "600M" cannot be reproduced from its printed configuration; this is 473M (the trunk
alone 451M). Arguments: `:demo` for the demo's 16->64 (two CPU cores), `:tiny` for tests.
"""

from ml_collections import ConfigDict

from configs import defaults


def get_config(arg: str = "") -> ConfigDict:
    """The run's complete record; `arg` is "", "demo" or "tiny"."""
    c = ConfigDict()
    c.name = "sr_256"
    c.seed = 0
    c.text = dict(dim=4096)  # T5-XXL v1.1; must be the width of the prepared embeddings
    # Trained on whole images (section 2.5).
    c.data = defaults.data() | dict(image_size=256, lowres_size=64, crop_size=0)
    c.model = dict(
        family="efficient_unet",
        widths=(128, 256, 512, 1024),
        blocks=(2, 4, 8, 8),
        attention=("none", "none", "none", "fused"),
        heads=8,
        cond_dim=512,
        pooling="attention",
        pool_heads=8,
        residual_scale=2**-0.5,  # section 2.5, B.1: read as the scale of residual sums
        scale_shift=True,
        dropout=0.0,
        dtype="bfloat16",
        remat="matrix",
    )
    c.diffusion = defaults.diffusion() | dict(aug_max=1.0)
    # Not in the paper: steps. w=8 has the best FID on COCO (Table 1). Levels of 0.1 to 0.3 look
    # best, level 0 has the best FID (Fig. A.11, A.12).
    c.sampling = defaults.sampling() | dict(steps=128, aug_level=0.1)
    c.optim = defaults.optim() | dict(optimizer="adam")
    c.mesh = defaults.mesh()
    c.train = defaults.train()
    if arg in ("demo", "tiny"):
        defaults.small(c)
        (demo if arg == "demo" else tiny)(c)
    elif arg:
        raise ValueError(f"sr_256 has no variant {arg!r}; use 'demo' or 'tiny'")
    return c.lock()


def demo(c: ConfigDict) -> None:
    """16->64 on whole images, a quarter of the paper's resolution."""
    c.name = "sr_64"
    c.data.update(image_size=64, lowres_size=16, batch_size=8, cache_mib=64)
    c.model.update(
        widths=(32, 64, 128),
        blocks=(1, 2, 3),
        attention=("none", "none", "fused"),
        heads=4,
        cond_dim=128,
        pool_heads=4,
    )
    # eps and v make a small network carry the noise of every pixel through its half-size features
    c.diffusion.prediction = "x"
    c.sampling.update(steps=16, w=1.0, threshold="static")  # white stays white, see base_64
    c.train.update(
        steps=100_000, log_every=20, sample_every=5_000, sample_rows=8, save_every=1_000, keep=2
    )


def tiny(c: ConfigDict) -> None:
    """A few thousand parameters with every part in place."""
    defaults.tiny(c)
    c.name = "sr_tiny"
    c.data.update(image_size=16, lowres_size=8)
    c.model.update(
        widths=(16, 32),
        blocks=(1, 1),
        attention=("none", "fused"),
        heads=2,
        cond_dim=16,
        pool_heads=2,
    )
